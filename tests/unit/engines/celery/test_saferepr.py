"""Values read out of Celery's text: equal where nothing was lost, harmless everywhere else."""

import datetime as dt
import json
import string
import uuid

import pytest
from celery.utils.saferepr import saferepr
from hypothesis import example, given
from hypothesis import strategies as st
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.engines.celery.saferepr import CUT, MAX_TEXT, ReprText, bound, parse
from z4j_bare.events.redaction import Redactor

SECRET = "hunter2"

redactor = Redactor(RedactionEngine())

#: Celery escapes no backslash, so text with one cannot always be told from its end; three dots are its own mark.
words = st.text(st.characters(exclude_characters="\\", exclude_categories=["Cs"]), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | words
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)

nasty = st.text(st.sampled_from("\\'\",:{}[]()<> ab."), max_size=8)
neighbours = st.recursive(
    st.none() | st.integers() | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty, inner, max_size=3),
    max_leaves=8,
)


class Odd:
    """An object that calls itself what a test says."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


def no_secret(_word):
    return False


@given(values)
def test_what_celery_did_not_cut_is_read_back(value):
    """JSON values survive the way through Celery's notation unchanged."""
    assert parse(saferepr(value, maxlevels=None), no_secret) == value


def test_python_s_own_types():
    """Tuples and sets become lists, bytes their class as in a worker; anything else stays as text."""
    day, number = dt.datetime(2026, 1, 2), uuid.UUID(int=1)
    given = ((1, {2}), {"raw": b"abc", "day": day, "id": number, 5: None})
    assert parse(saferepr(given), no_secret) == [
        [1, [2]], {"raw": "<builtins.bytes>", "day": repr(day), "id": repr(number), "5": None}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[[...]]]", [[[CUT]]]),
        ("{'a': 1, 'b': 'zz...', ...}", {"a": 1, "b": "zz...", "...": CUT}),
        ("({'pas...', ...},)", [["pas...", CUT]]),
        ("({'a': [1, 2", [{"a": [1, 2, CUT], "...": CUT}, CUT]),
        ("(1, [2)", [1, ["2)", CUT], CUT]),
        ("<hidden>", "<hidden>"),
        ("{'p': 'C:\\', 'q': 'x'}", {"p": "'C:\\'", "q": "x"}),
        ("{'who': <User O'Brien, 5>, 'n': 1}", {"who": "<User O'Brien, 5>", "n": 1}),
        ("{'a': }", {"a": ""}),
        ("1e999", "1e999"),
        ("9" * 400, "9" * 400),
        ("", ""),
        ("}", "}"),
    ],
)
def test_what_is_cut_or_odd(text, value):
    """What Celery left out is marked, and what is no literal is text between its neighbours."""
    assert parse(text, no_secret) == value


@given(st.text(st.sampled_from("'\"\\()[]{}<>,:. ab1-e\n") | st.characters(), max_size=200))
@example("[" * 9000)
@example("{'a':" * 2000)
@example("'\\" * 5000)
@example("<a," * 3000)
def test_any_text_is_read(text):
    """Whatever stands there, the outcome is JSON, and not much larger than the text."""
    encoded = json.dumps(parse(text, redactor.is_sensitive_key), allow_nan=False)
    assert len(encoded) <= 12 * min(len(text), MAX_TEXT) + 200


@given(
    neighbours,
    st.sampled_from(["password", "api_key", "Token"]),
    neighbours,
    st.integers(1, 400),
    st.booleans(),
)
def test_no_secret_survives(before, key, after, length, nested):
    """Whatever stands beside it and wherever Celery cuts, the value under a sensitive key is hidden or gone."""
    hidden = {"before": before, key: [SECRET] if nested else SECRET, "after": after}
    told = redactor.scrub(parse(saferepr(hidden, maxlen=length), redactor.is_sensitive_key))
    assert SECRET not in json.dumps(told)


@given(st.text(string.printable, max_size=30), st.text(string.printable, max_size=30))
@example("<User ", ", 12>")
@example("C:\\", "")
def test_an_odd_repr_gives_nothing_away(start, end):
    """An object that shows a password in its own words is hidden, and so is every other piece that cannot be read."""
    told = redactor.scrub(
        parse(
            saferepr({"who": Odd(f"<{start} password={SECRET} {end}>"), "n": 1}),
            redactor.is_sensitive_key,
        )
    )
    assert SECRET not in json.dumps(told)


def test_a_path_does_not_swallow_the_next_key():
    """A backslash before a quote, which Celery does not escape, leaves the password after it hidden."""
    text = saferepr({"path": "C:\\", "password": SECRET, "more": "x"})
    assert redactor.scrub(parse(text, redactor.is_sensitive_key))["password"] == "[REDACTED]"


def test_only_text_is_kept_to_be_read():
    """Text is bounded and read later; real values, which protocol 1 can bring, are copied as in a worker."""
    assert isinstance(bound("(1,)"), ReprText)
    assert len(bound("x" * 100_000)) == MAX_TEXT
    assert bound([1, (2,)]) == [1, [2]]
    assert parse(bound("(" + "1, " * 100_000), no_secret)[-1] == CUT
