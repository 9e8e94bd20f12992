"""A bounded copy of what a task was called with, or returned, taken on the host's time.

It runs none of the host's code: JSON types are copied through their own type's methods, a few well-known ones become text,
and anything else becomes the name of its class. What is cut is marked as cut.
"""

from __future__ import annotations

import datetime
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
    datetime.datetime,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
    pathlib.PurePath,
)


class Cut(str):
    """The beginning of a longer string: ``limit`` characters to send, up to ``MARGIN`` more to look at, ``length`` in all."""

    __slots__ = ("length", "limit")

    limit: int
    length: int

    @classmethod
    def of(cls, text: str, limit: int) -> Cut:
        """Cut ``text`` after ``limit`` characters."""
        cut = cls(str.__getitem__(text, slice(0, limit + MARGIN)))
        cut.limit, cut.length = limit, str.__len__(text)
        return cut


def snapshot(value: Any) -> Any:
    """Return a copy of ``value`` within the bounds; strings over them come as :class:`Cut`."""
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
        if isinstance(value, enum.Enum):
            return self.text(f"{type(value).__name__}.{value._name_}")
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int):
            number = int.__int__(value)
            return number if number.bit_length() <= MAX_INT_BITS else f"<int of {number.bit_length()} bits>"
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return self.container(value, depth - 1)
        if type(value) in _AS_TEXT or isinstance(value, pathlib.PurePath):
            return self.text(str(value))
        return f"<{type(value).__module__}.{type(value).__qualname__}>"

    def text(self, value: str) -> str:
        length = str.__len__(value)
        left = max(0, self.chars)
        self.chars -= length
        if length > left:
            return Cut.of(value, left)
        return value if type(value) is str else str.__str__(value)

    def container(self, value: Any, depth: int) -> Any:
        if depth <= 0:
            return f"<{type(value).__name__} nested too deep>"
        if isinstance(value, dict):
            return self.mapping(value, depth)
        iterate = next(base.__iter__ for base in (list, tuple, set, frozenset) if isinstance(value, base))
        items = [self.copy(item, depth) for item in islice(iterate(value), max(0, self.nodes))]
        return self.mark(items, value)

    def mapping(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in islice(dict.items(value), max(0, self.nodes)):
            if self.nodes <= 0:
                break
            result[key if type(key) is str and len(key) < MARGIN else self.key(key)] = self.copy(item, depth)
        missing = dict.__len__(value) - len(result)
        if missing > 0:
            result["..."] = f"[... {missing} more cut]"
        return result

    def mark(self, items: list[Any], value: Any) -> list[Any]:
        missing = len(value) - len(items)
        return [*items, f"[... {missing} more cut]"] if missing > 0 else items

    def key(self, key: Any) -> str:
        named = self.copy(key, 1)
        return named[:MARGIN] if isinstance(named, str) else str(named)
