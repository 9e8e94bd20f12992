"""The bounded copy: faithful to plain values, deaf to the host's code, cheap for huge ones."""

import dataclasses
import datetime as dt
import decimal
import enum
import pathlib
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.events.snapshot import MARGIN, MAX_CHARS, MAX_NODES, TruncatedStr, snapshot

SMALL = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(SMALL)
def test_small_plain_values_are_copied_as_they_are(value):
    """A plain value within the bounds comes out equal."""
    assert snapshot(value) == value


def test_the_copy_is_a_copy():
    """What the task does to its arguments afterwards does not reach the event."""
    given_value = {"items": [1, {"a": "b"}]}
    taken = snapshot(given_value)
    given_value["items"][1]["a"] = "changed"
    given_value["items"].append(2)
    assert taken == {"items": [1, {"a": "b"}]}


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (dt.datetime(2026, 1, 2, 3, 4, 5), "2026-01-02 03:04:05"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (dt.time(3, 4), "03:04:00"),
        (dt.timedelta(seconds=5), "0:00:05"),
        (decimal.Decimal("1.50"), "1.50"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Colour.RED, "Colour.RED"),
        (Level.HIGH, "Level.HIGH"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        ((1, 2), [1, 2]),
        ({7}, [7]),
        (10**400, "<int of 1329 bits>"),
        (b"secret", "<builtins.bytes>"),
        (object, "<builtins.type>"),
    ],
)
def test_well_known_types(value, expected):
    """The types users pass most often come as text, tuples and sets as lists, other things as their class's name."""
    assert snapshot([value]) == [expected]


class Rude:
    """Every way of asking it anything fails the test."""

    def _fail(self, *_):
        raise AssertionError("the host's code was called")

    __str__ = __repr__ = __iter__ = __len__ = __eq__ = __bool__ = __getattribute__ = _fail
    __hash__ = object.__hash__


def test_no_code_of_the_hosts_runs():
    """An object is named by its class without a single call of its own methods."""
    assert snapshot([Rude()]) == [f"<{__name__}.Rude>"]


def test_subclasses_of_containers_are_read_by_their_base():
    """A dict or list subclass with methods of its own is copied through dict's and list's."""

    class Sly(dict):
        def items(self):
            raise AssertionError

        def __len__(self):
            raise AssertionError

    class Slow(list):
        def __iter__(self):
            raise AssertionError

    assert snapshot({"a": Sly(b=1), "c": Slow([2])}) == {"a": {"b": 1}, "c": [2]}


def test_dataclasses_are_named():
    """A dataclass holds whatever its author put there; only its class is told."""

    @dataclasses.dataclass
    class Card:
        number: str

    assert "4242" not in str(snapshot({"card": Card("4242")}))


def test_long_strings_keep_a_margin():
    """A long string keeps the margin for redaction and remembers how long it was."""
    cut = snapshot("x" * (5 * 1024 * 1024))
    assert isinstance(cut, TruncatedStr)
    assert len(cut) == MAX_CHARS + MARGIN
    assert cut.length == 5 * 1024 * 1024


def test_characters_are_counted_over_the_whole_value():
    """Ten strings of 8 KB share one budget of 16 KiB."""
    taken = snapshot(["y" * 8192] * 10)
    assert (
        sum(item.limit if isinstance(item, TruncatedStr) else len(item) for item in taken)
        == MAX_CHARS
    )


def test_long_lists_are_marked():
    """A list of 100,000 items stops at the node budget and says how many are missing."""
    taken = snapshot(list(range(100_000)))
    assert taken[0] == 0
    assert len(taken) <= MAX_NODES
    assert taken[-1] == f"[... {100_000 - len(taken) + 1} more cut]"


def test_wide_dicts_are_marked():
    """A dict of 100,000 entries stops likewise."""
    taken = snapshot({str(number): number for number in range(100_000)})
    assert len(taken) <= MAX_NODES
    assert taken["..."].endswith("more cut]")


def test_cycles_and_depth_end():
    """A structure that contains itself, and one nested without end, come to an end."""
    loop = []
    loop.append(loop)
    assert "nested too deep" in str(snapshot(loop))


def test_odd_keys_become_text():
    """Keys that are no strings are told like values; a huge one is cut."""
    taken = snapshot({1: "a", None: "b", Rude(): "c", "k" * 5000: "d"})
    assert set(taken) == {"1", "None", f"<{__name__}.Rude>", "k" * MARGIN}


def test_a_huge_value_costs_no_more_than_a_medium_one():
    """A 5 MB string and a million-item list cost a small multiple of a full-budget value: the copy stops early."""

    def cost(value):
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            snapshot(value)
            best = min(best, time.perf_counter() - began)
        return best

    medium = cost(list(range(MAX_NODES)))
    assert cost([["z" * 5_000_000], list(range(1_000_000))]) < 20 * medium
