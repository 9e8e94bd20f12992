"""Copies task arguments and results, with limits on size and depth.

The host's task waits for the snapshot. A snapshot runs no code of the host, except the ``tzinfo``
of a date or time. JSON types are copied by the methods of the built-in types. A few well-known
types become text, and all other objects become the name of their class.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import pathlib
import uuid
from itertools import islice
from typing import Any

from z4j_bare.safety import is_control_flow

#: Maximum total characters of one snapshot. Redacting ten strings of 8 KB each would take 36 ms.
MAX_CHARS = 16 * 1024

#: Maximum number of values in one snapshot, including containers.
MAX_NODES = 500

#: Number of characters that a truncated string keeps beyond its limit. With these characters,
#: redaction finds a secret that crosses the limit.
MARGIN = 1024

#: Maximum nesting depth. The name of the type replaces a deeper container.
MAX_DEPTH = 32

#: Maximum bits of an integer. A larger integer is replaced by a text with the integer's size,
#: because Python parses at most 4,300 digits.
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

#: The descriptors of these attributes in ``type``. A metaclass may redefine the attributes.
_MODULE, _QUALNAME = type.__dict__["__module__"], type.__dict__["__qualname__"]


class TruncatedStr(str):
    """The start of a longer string.

    The first ``limit`` characters are sent. Up to ``MARGIN`` more characters are kept for
    redaction. ``length`` is the number of characters of the original string.
    """

    __slots__ = ("length", "limit")

    limit: int
    length: int

    @classmethod
    def of(cls, text: str, limit: int) -> TruncatedStr:
        """Return ``text`` truncated to ``limit`` characters plus the margin."""
        truncated = cls(str.__getitem__(text, slice(0, limit + MARGIN)))
        truncated.limit, truncated.length = limit, str.__len__(text)
        return truncated


class TypedStr(str):
    """The text of a value of a well-known type. ``described`` is the value's ``repr``."""

    __slots__ = ("described",)

    described: str

    @classmethod
    def of(cls, value: object) -> TypedStr:
        """Return the text of ``value``."""
        text = cls(value)
        text.described = repr(value)
        return text


class OpaqueStr(str):
    """A text that replaces a value and names only its class or its size."""

    __slots__ = ()


def class_name(kind: type) -> str:
    """Return the module and the name of a class. Runs no code of the class's metaclass."""
    name: str = _QUALNAME.__get__(kind)
    try:
        module = _MODULE.__get__(kind)
    except AttributeError:
        return name
    return f"{module}.{name}" if type(module) is str else name


def snapshot(value: Any) -> Any:
    """Return a bounded copy of ``value``. Strings over the limit become :class:`TruncatedStr`."""
    kind = type(value)
    if value is None or kind is bool or kind is float or (kind is str and len(value) <= MAX_CHARS):
        return value
    return _Copier().copy(value, MAX_DEPTH)


class _Copier:
    """Copies one value with at most ``chars`` more characters and ``nodes`` more values."""

    __slots__ = ("chars", "nodes")

    def __init__(self) -> None:
        self.chars = MAX_CHARS
        self.nodes = MAX_NODES

    def copy(self, value: Any, depth: int) -> Any:
        self.nodes -= 1
        if value is None or value is True or value is False:
            return value
        # isinstance() is not used, because it reads value.__class__. This may run the host's code.
        kind = type(value)
        try:
            if issubclass(kind, enum.Enum):
                return self.member(value, kind)
            if issubclass(kind, str):
                return self.text(value)
            if issubclass(kind, int):
                number = int.__int__(value)
                bits = number.bit_length()
                return number if bits <= MAX_INT_BITS else OpaqueStr(f"<int of {bits} bits>")
            if issubclass(kind, float):
                return float.__float__(value)
            if issubclass(kind, _CONTAINERS):
                return self.container(value, kind, depth - 1)
            if kind in _AS_TEXT:
                return self.typed_text(value)
        except Exception as error:
            # The text of a datetime runs the code of its tzinfo. An error in one value must not
            # drop the event, because the event also reports the task's state.
            if is_control_flow(error):
                raise
        return OpaqueStr(f"<{class_name(kind)}>")

    def member(self, value: Any, kind: type) -> str:
        # A combination of flags without a name has the name None.
        name = object.__getattribute__(value, "_name_")
        if name is None:
            name = object.__getattribute__(value, "_value_")
        return self.text(f"{class_name(kind).rpartition('.')[2]}.{name}")

    def text(self, value: str) -> str:
        length = str.__len__(value)
        remaining = max(0, self.chars)
        self.chars -= length
        if length > remaining:
            return TruncatedStr.of(value, remaining)
        return value if type(value) is str else str.__str__(value)

    def typed_text(self, value: object) -> str:
        text = TypedStr.of(value)
        remaining = max(0, self.chars)
        self.chars -= len(text)
        return TruncatedStr.of(text, remaining) if len(text) > remaining else text

    def container(self, value: Any, kind: type, depth: int) -> Any:
        if depth <= 0:
            return OpaqueStr(f"<{kind.__name__} nested too deep>")
        base = next(base for base in _CONTAINERS if issubclass(kind, base))
        return self.mapping(value, depth) if base is dict else self.sequence(value, base, depth)

    def mapping(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        length = dict.__len__(value)
        try:
            for key, item in islice(dict.items(value), max(0, self.nodes)):
                if self.nodes <= 0:
                    break
                result[key if type(key) is str and len(key) < MARGIN else self.key(key)] = (
                    self.copy(item, depth)
                )
        except RuntimeError:  # another thread changed the dict; list() copies its items in one step
            return self.mapping(dict(list(islice(dict.items(value), MAX_NODES + 1))), depth)
        missing = length - len(result)
        if missing > 0:
            result["..."] = f"[... {missing} more cut]"
        return result

    def sequence(self, value: Any, base: Any, depth: int) -> list[Any]:
        items: list[Any] = []
        try:
            for item in islice(base.__iter__(value), max(0, self.nodes)):
                if self.nodes <= 0:
                    break
                items.append(self.copy(item, depth))
        except RuntimeError:  # another thread changed the set
            return self.sequence(list(islice(base.__iter__(value), MAX_NODES + 1)), list, depth)
        missing = base.__len__(value) - len(items)
        return [*items, f"[... {missing} more cut]"] if missing > 0 else items

    def key(self, key: object) -> str:
        name = self.copy(key, 1)
        return name[:MARGIN] if isinstance(name, str) else str(name)
