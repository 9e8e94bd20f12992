"""Values parsed from ``saferepr`` text: equal where nothing was cut, safe everywhere else."""

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

#: Text without backslashes: Celery does not escape them, so the end of a string is ambiguous.
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

punctuation = st.text(st.sampled_from("\\'\",:{}[]()<> ab."), max_size=8)
neighbours = st.recursive(
    st.none() | st.integers() | punctuation,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(punctuation, inner, max_size=3),
    max_leaves=8,
)


class CustomRepr:
    """An object with a given ``repr``."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


def nothing_sensitive(_word):
    return False


@given(values)
def test_parse_inverts_saferepr(value):
    """JSON values survive the conversion to Celery's notation and back."""
    assert parse(saferepr(value, maxlevels=None), nothing_sensitive) == value


def test_parse_converts_python_types():
    """Tuples and sets become lists, bytes the name of their class; other objects stay text."""
    day, number = dt.datetime(2026, 1, 2), uuid.UUID(int=1)
    given = ((1, {2}), {"raw": b"abc", "day": day, "id": number, 5: None})
    assert parse(saferepr(given), nothing_sensitive) == [
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
def test_parse_marks_cut_values_and_keeps_opaque_text(text, value):
    """What Celery left out is marked, and what cannot be parsed is text between its neighbours."""
    assert parse(text, nothing_sensitive) == value


@given(st.text(st.sampled_from("'\"\\()[]{}<>,:. ab1-e\n") | st.characters(), max_size=200))
@example("[" * 9000)
@example("{'a':" * 2000)
@example("'\\" * 5000)
@example("<a," * 3000)
def test_parse_accepts_any_text(text):
    """The result for any text is JSON, not much larger than the text."""
    encoded = json.dumps(parse(text, redactor.is_sensitive_key), allow_nan=False)
    assert len(encoded) <= 12 * min(len(text), MAX_TEXT) + 200


@given(
    neighbours,
    st.sampled_from(["password", "api_key", "Token"]),
    neighbours,
    st.integers(1, 400),
    st.booleans(),
)
def test_parse_hides_value_of_sensitive_key(before, key, after, length, nested):
    """Whatever surrounds it and wherever Celery cuts, the value of a sensitive key is redacted or
    missing.
    """
    hidden = {"before": before, key: [SECRET] if nested else SECRET, "after": after}
    parsed = redactor.scrub(parse(saferepr(hidden, maxlen=length), redactor.is_sensitive_key))
    assert SECRET not in json.dumps(parsed)


@given(st.text(string.printable, max_size=30), st.text(string.printable, max_size=30))
@example("<User ", ", 12>")
@example("C:\\", "")
def test_parse_hides_secret_in_opaque_text(start, end):
    """Opaque text that names a password is redacted, and so is every other opaque text."""
    parsed = redactor.scrub(
        parse(
            saferepr({"who": CustomRepr(f"<{start} password={SECRET} {end}>"), "n": 1}),
            redactor.is_sensitive_key,
        )
    )
    assert SECRET not in json.dumps(parsed)


def test_parse_ends_string_at_unescaped_backslash():
    """Celery does not escape a backslash before a quote; the password after it stays hidden."""
    text = saferepr({"path": "C:\\", "password": SECRET, "more": "x"})
    assert redactor.scrub(parse(text, redactor.is_sensitive_key))["password"] == "[REDACTED]"


def test_bound_keeps_text_and_copies_values():
    """Text is bounded and parsed later; real values, which protocol 1 can carry, are copied."""
    assert isinstance(bound("(1,)"), ReprText)
    assert len(bound("x" * 100_000)) == MAX_TEXT
    assert bound([1, (2,)]) == [1, [2]]
    assert parse(bound("(" + "1, " * 100_000), nothing_sensitive)[-1] == CUT
