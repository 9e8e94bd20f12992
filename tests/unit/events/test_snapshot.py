"""Snapshots are equal to plain values, run no host code, and have a bounded cost."""

import dataclasses
import datetime as dt
import decimal
import enum
import pathlib
import time
import uuid

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
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
def test_snapshot_of_small_value_is_equal(value):
    """A plain value within the bounds is copied unchanged."""
    assert snapshot(value) == value


def test_snapshot_is_independent():
    """Changes that the task makes to its arguments afterwards do not reach the event."""
    arguments = {"items": [1, {"a": "b"}]}
    copied = snapshot(arguments)
    arguments["items"][1]["a"] = "changed"
    arguments["items"].append(2)
    assert copied == {"items": [1, {"a": "b"}]}


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
def test_snapshot_converts_common_types(value, expected):
    """Common types become text, tuples and sets become lists, others the name of their class."""
    assert snapshot([value]) == [expected]


class UncallableObject:
    """An object whose methods all fail the test."""

    def _fail(self, *_):
        raise AssertionError("the host's code was called")

    __str__ = __repr__ = __iter__ = __len__ = __eq__ = __bool__ = __getattribute__ = _fail
    __hash__ = object.__hash__


def test_snapshot_runs_no_host_code():
    """An object is replaced by its class's name without a call of its methods."""
    assert snapshot([UncallableObject()]) == [f"<{__name__}.UncallableObject>"]


class FailingMeta(type):
    """A metaclass whose classes raise an error for their name."""

    __module__ = property(lambda cls: 1 / 0)

    def __getattribute__(cls, name):
        raise AssertionError(name)


class FailingZone(dt.tzinfo):
    def utcoffset(self, _moment):
        raise ValueError

    dst = tzname = utcoffset


class FailingMember(enum.Enum):
    ONE = 1

    def __str__(self):
        raise AssertionError

    __repr__ = __format__ = __str__


class Permission(enum.IntFlag):
    READ = 1
    WRITE = 2


def test_value_that_raises_costs_itself_alone():
    """A value whose text or class raises is replaced by its class's name; the others are copied."""
    failing = FailingMeta("Failing", (), {"__module__": "shop"})
    values = [
        dt.datetime(2026, 1, 2, tzinfo=FailingZone()),
        type.__call__(failing),
        FailingMember.ONE,
        {"deep": [dt.datetime(2026, 1, 2, tzinfo=FailingZone()), 1]},
    ]
    assert snapshot(values) == [
        "<datetime.datetime>",
        "<shop.Failing>",
        "FailingMember.ONE",
        {"deep": ["<datetime.datetime>", 1]},
    ]


def test_time_limit_inside_snapshot_propagates():
    """A time limit that expires while a value is copied reaches the task."""

    class LimitedZone(dt.tzinfo):
        def utcoffset(self, _moment):
            raise SoftTimeLimitExceeded

    with pytest.raises(SoftTimeLimitExceeded):
        snapshot([dt.datetime(2026, 1, 2, tzinfo=LimitedZone())])


def test_unnamed_flags_have_their_value():
    """A combination of flags without a name is shown by its number."""
    assert snapshot([Permission(8), Permission.READ]) == ["Permission.8", "Permission.READ"]


def test_snapshot_reads_subclasses_by_their_base():
    """A subclass of dict or list with own methods is copied by the methods of dict and list."""

    class DictSubclass(dict):
        def items(self):
            raise AssertionError

        def __len__(self):
            raise AssertionError

    class ListSubclass(list):
        def __iter__(self):
            raise AssertionError

    assert snapshot({"a": DictSubclass(b=1), "c": ListSubclass([2])}) == {"a": {"b": 1}, "c": [2]}


def test_snapshot_names_dataclass():
    """A dataclass may hold anything, so only its class is copied."""

    @dataclasses.dataclass
    class Card:
        number: str

    assert "4242" not in str(snapshot({"card": Card("4242")}))


def test_snapshot_keeps_margin_of_long_string():
    """A long string keeps the margin for redaction, and its original length."""
    cut = snapshot("x" * (5 * 1024 * 1024))
    assert isinstance(cut, TruncatedStr)
    assert len(cut) == MAX_CHARS + MARGIN
    assert cut.length == 5 * 1024 * 1024


def test_snapshot_counts_characters_of_whole_value():
    """Ten strings of 8 KB share one budget of 16 KiB."""
    copied = snapshot(["y" * 8192] * 10)
    assert (
        sum(item.limit if isinstance(item, TruncatedStr) else len(item) for item in copied)
        == MAX_CHARS
    )


def test_snapshot_marks_long_list():
    """A list of 100,000 items ends at the node limit and says how many are missing."""
    copied = snapshot(list(range(100_000)))
    assert copied[0] == 0
    assert len(copied) <= MAX_NODES
    assert copied[-1] == f"[... {100_000 - len(copied) + 1} more cut]"


def test_snapshot_marks_large_dict():
    """A dict of 100,000 entries ends likewise."""
    copied = snapshot({str(number): number for number in range(100_000)})
    assert len(copied) <= MAX_NODES
    assert copied["..."].endswith("more cut]")


def test_snapshot_ends_at_maximum_depth():
    """A structure that contains itself ends at the maximum depth."""
    loop = []
    loop.append(loop)
    assert "nested too deep" in str(snapshot(loop))


def test_snapshot_converts_keys_to_text():
    """Keys that are not strings are converted like values, and a huge key is truncated."""
    copied = snapshot({1: "a", None: "b", UncallableObject(): "c", "k" * 5000: "d"})
    assert set(copied) == {"1", "None", f"<{__name__}.UncallableObject>", "k" * MARGIN}


def test_snapshot_cost_is_bounded():
    """A 5 MB string and a list of a million items cost at most a small multiple of a value at the
    limits.
    """

    def cost(value):
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            snapshot(value)
            best = min(best, time.perf_counter() - began)
        return best

    medium = cost(list(range(MAX_NODES)))
    assert cost([["z" * 5_000_000], list(range(1_000_000))]) < 20 * medium
