"""Sanitises and encodes values as canonical JSON; parses and encodes large values in small steps.

To check a signature, the brain parses the frame and encodes it again. If the new encoding differs
in one byte, the check fails (close code 4403). Some values crash the brain's parser (close code
1011). Therefore every value is converted to plain JSON types before signing. NUL is replaced,
because the brain's database rejects NUL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]  # the pure Python parser
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from z4j_bare.wire.fit import has_nul, replace_nul

#: Maximum bits of an integer (309 digits).
#: A text replaces a larger integer, because ``json`` parses at most 4,300 digits.
MAX_INT_BITS = 1024

#: Maximum nesting levels of a value.
#: The brain redacts all values below level 64, and an event's envelope takes four levels.
MAX_DEPTH = 60

#: Minimum characters of a piece that ``iter_canonical`` yields.
#: Also the maximum characters of a string that is encoded in one step.
CHUNK_CHARS = 16 * 1024

_encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode

Scan = Callable[[str, int], tuple[Any, int]]


def canonical(value: object) -> bytes:
    """Return the canonical JSON of any value, sanitised by :func:`to_json_types`, without NUL."""
    return without_nul(sanitised_text(value)).encode()


def canonical_plain(value: object) -> bytes:
    """Return the canonical JSON of a value that consists of JSON types with string keys.

    NUL is replaced. A value with a lone surrogate or a non-finite float is sanitised.
    """
    return without_nul(plain_text(value)).encode()


def sanitised_text(value: object) -> str:
    """Sanitise any value and return its canonical JSON as text. NUL is not replaced."""
    return _encode(to_json_types(value))


def plain_text(value: object) -> str:
    """Do the same as :func:`canonical_plain`, but return text. NUL is not replaced."""
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
    except ValueError:  # UnicodeEncodeError is a subclass
        return sanitised_text(value)
    return text


def without_nul(text: str) -> str:
    """Replace NUL in canonical JSON, and sort its keys again."""
    return _encode(json.loads(replace_nul(text))) if has_nul(text) else text


def to_json_types(value: object, depth: int = MAX_DEPTH) -> Any:
    """Convert ``value`` to JSON types that parsing and encoding again does not change."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        integer = int(value)
        bits = integer.bit_length()
        return integer if bits <= MAX_INT_BITS else f"<int of {bits} bits>"
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if depth <= 0:
        return "<nested too deep>"
    if isinstance(value, Mapping):
        return _object(value, depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json_types(item, depth - 1) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    return _text(_describe(value))


def loads_incrementally(message: bytes, checkpoint: Callable[[], object]) -> Any:
    """Parse as ``json.loads`` does, and call ``checkpoint`` before every value.

    The C parser would block the hub for 15 to 150 ms for a message of 1 MiB. The pure Python parser
    of this function can yield, but takes ten times the CPU time. Raises ``ValueError`` or
    ``RecursionError``.
    """

    def yielding(scan: Scan) -> Scan:
        def scan_once(text: str, index: int) -> tuple[Any, int]:
            checkpoint()
            return scan(text, index)

        return scan_once

    decoder: Any = json.JSONDecoder()
    decoder.parse_array = lambda at, scan, *rest: JSONArray(at, yielding(scan), *rest)
    decoder.parse_object = lambda at, strict, scan, *rest: JSONObject(
        at, strict, yielding(scan), *rest
    )
    decoder.scan_once = py_make_scanner(decoder)
    return decoder.decode(message.decode())


def iter_canonical(value: object, checkpoint: Callable[[], object]) -> Iterator[bytes]:
    """Yield the canonical JSON of a parsed value in pieces; call ``checkpoint`` for each token."""
    chunk: list[str] = []
    size = 0
    for text in _tokens(value):
        checkpoint()
        chunk.append(text)
        size += len(text)
        if size > CHUNK_CHARS:
            yield "".join(chunk).encode()
            chunk, size = [], 0
    yield "".join(chunk).encode()


def _object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    # Without this conversion, ``json`` would encode the keys 1 and "1" as two equal keys.
    # The brain's parser would keep only one of the two, and the signature would not match.
    result: dict[str, Any] = {}
    for key, item in value.items():
        name = _text(key if isinstance(key, str) else _describe(key))
        result[name] = to_json_types(item, depth - 1)
    return result


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        return str(value).encode(errors="replace").decode()
    return str.__str__(value)


def _describe(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _tokens(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        separator = "{"
        for name in sorted(value):
            yield f"{separator}{_encode(name)}:"
            yield from _tokens(value[name])
            separator = ","
        yield "}" if value else "{}"
    elif isinstance(value, list):
        separator = "["
        for item in value:
            yield separator
            yield from _tokens(item)
            separator = ","
        yield "]" if value else "[]"
    elif isinstance(value, str) and len(value) > CHUNK_CHARS:
        yield '"'
        for start in range(0, len(value), CHUNK_CHARS):
            yield _encode(value[start : start + CHUNK_CHARS])[1:-1]
        yield '"'
    else:
        yield _encode(value)
