"""A bounded copy of what a task was called with, or returned, taken on the host's time.

It runs none of the host's code: JSON types are copied through their own type's methods, a few well-known ones become text,
and anything else becomes the name of its class. What is cut is marked as cut.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import pathlib
import uuid
from itertools import islice
from typing import Any

#: Characters and nodes that one event may bring; ten 8 KB values cost 36 ms of redaction otherwise (design, rule 5).
MAX_CHARS = 16 * 1024
MAX_NODES = 500

#: Characters kept beyond a cut until redaction has seen them, so that no secret survives on the edge.
MARGIN = 1024

#: Nesting beyond which a value is named instead of copied; the brain redacts below 64.
MAX_DEPTH = 32

#: Integers over this many bits are named: Python refuses to parse more than 4,300 digits.
MAX_INT_BITS = 1024

_AS_TEXT = (
    dt.datetime,
    dt.date,
    dt.time,
    dt.timedelta,
    decimal.Decimal,
    uuid.UUID,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    pathlib.PosixPath,
    pathlib.WindowsPath,
)
_CONTAINERS = (dict, list, tuple, set, frozenset)


class TruncatedStr(str):
    """The beginning of a longer string: ``limit`` characters to send, ``MARGIN`` more to look at, ``length`` in all."""

    __slots__ = ("length", "limit")

    limit: int
    length: int

    @classmethod
    def of(cls, text: str, limit: int) -> TruncatedStr:
        """Cut ``text`` after ``limit`` characters."""
        cut = cls(str.__getitem__(text, slice(0, limit + MARGIN)))
        cut.limit, cut.length = limit, str.__len__(text)
        return cut


def snapshot(value: Any) -> Any:
    """Return a copy of ``value`` within the bounds; strings over them come as :class:`TruncatedStr`."""
    kind = type(value)
    if value is None or kind is bool or kind is float or (kind is str and len(value) <= MAX_CHARS):
        return value
    return _Copy().copy(value, MAX_DEPTH)


class _Copy:
    """One pass over a value, and what is left of its bounds."""

    __slots__ = ("chars", "nodes")

    def __init__(self) -> None:
        self.chars = MAX_CHARS
        self.nodes = MAX_NODES

    def copy(self, value: Any, depth: int) -> Any:
        self.nodes -= 1
        if value is None or value is True or value is False:
            return value
        kind = type(
            value
        )  # not isinstance: that asks the value for its __class__, which may be the host's code
        if issubclass(kind, enum.Enum):
            return self.text(f"{kind.__name__}.{value._name_}")
        if issubclass(kind, str):
            return self.text(value)
        if issubclass(kind, int):
            number = int.__int__(value)
            return (
                number
                if number.bit_length() <= MAX_INT_BITS
                else f"<int of {number.bit_length()} bits>"
            )
        if issubclass(kind, float):
            return float.__float__(value)
        if issubclass(kind, _CONTAINERS):
            return self.container(value, kind, depth - 1)
        if kind in _AS_TEXT:
            return self.text(str(value))
        return f"<{kind.__module__}.{kind.__qualname__}>"

    def text(self, value: str) -> str:
        length = str.__len__(value)
        left = max(0, self.chars)
        self.chars -= length
        if length > left:
            return TruncatedStr.of(value, left)
        return value if type(value) is str else str.__str__(value)

    def container(self, value: Any, kind: type, depth: int) -> Any:
        if depth <= 0:
            return f"<{kind.__name__} nested too deep>"
        base = next(base for base in _CONTAINERS if issubclass(kind, base))
        return self.mapping(value, depth) if base is dict else self.sequence(value, base, depth)

    def mapping(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in islice(dict.items(value), max(0, self.nodes)):
            if self.nodes <= 0:
                break
            result[key if type(key) is str and len(key) < MARGIN else self.key(key)] = self.copy(
                item, depth
            )
        missing = dict.__len__(value) - len(result)
        if missing > 0:
            result["..."] = f"[... {missing} more cut]"
        return result

    def sequence(self, value: Any, base: Any, depth: int) -> list[Any]:
        items: list[Any] = []
        for item in islice(base.__iter__(value), max(0, self.nodes)):
            if self.nodes <= 0:
                break
            items.append(self.copy(item, depth))
        missing = base.__len__(value) - len(items)
        return [*items, f"[... {missing} more cut]"] if missing > 0 else items

    def key(self, key: Any) -> str:
        named = self.copy(key, 1)
        return named[:MARGIN] if isinstance(named, str) else str(named)
