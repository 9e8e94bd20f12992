"""Canonical JSON: a sanitiser, an encoder, and an incremental parser and encoder.

The brain parses a frame and encodes it again to check the signature. A value whose bytes change in
this round trip fails the check (close code 4403) or crashes the brain's parser (1011). Both end the
session. Therefore every value is converted to plain JSON types before signing. A NUL character,
which the brain's database rejects, is replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]  # the pure Python parser
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from z4j_bare.wire.fit import has_nul, replace_nul

#: Maximum bits of an integer (1,024 bits are 309 digits). A larger integer is replaced by a text,
#: because ``json`` refuses to parse more than 4,300 digits (``sys.set_int_max_str_digits``) and no
#: integer column of a database is this large.
MAX_INT_BITS = 1024

#: Maximum nesting levels of a value. The brain redacts everything below level 64, and an event's
#: envelope takes four levels.
MAX_DEPTH = 60

#: Number of characters from which on ``iter_canonical`` yields a piece, and maximum length of a
#: string that it encodes in one step.
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

    NUL is replaced. A lone surrogate or a non-finite float makes the encoder fail, and the value is
    then sanitised.
    """
    return without_nul(plain_text(value)).encode()


def sanitised_text(value: object) -> str:
    """Return what :func:`canonical` returns, as text and with NUL."""
    return _encode(to_json_types(value))


def plain_text(value: object) -> str:
    """Return what :func:`canonical_plain` returns, as text and with NUL."""
    try:
        text = _encode(value)
        if not text.isascii():
            text.encode()
    except ValueError:  # UnicodeEncodeError is a subclass
        return sanitised_text(value)
    return text


def without_nul(text: str) -> str:
    """Return canonical JSON without NUL, and canonical again: its keys may have changed."""
    return _encode(json.loads(replace_nul(text))) if has_nul(text) else text


def to_json_types(value: object, depth: int = MAX_DEPTH) -> Any:
    """Return ``value`` as JSON types that encode to the same bytes after a round trip."""
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

    Large messages would block the hub if they were parsed in one step: the C parser takes 15 to
    150 ms for 1 MiB. This function uses the pure Python parser, which takes ten times the CPU time.
    Raises ``ValueError`` or ``RecursionError``.
    """

    def yielding(scan: Scan) -> Scan:
        def scan_once(text: str, index: int) -> tuple[Any, int]:
            checkpoint()
            return scan(text, index)

        return scan_once

    decoder: Any = json.JSONDecoder()
    decoder.parse_array = lambda at, scan: JSONArray(at, yielding(scan))
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
    # ``json`` would encode the keys 1 and "1" as two equal keys. The brain's parser keeps only one
    # of two equal keys, so the signature would not match.
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
