"""JSON in bites, for messages whose parsing or encoding in one piece would hold a hub up: 1 MiB is 15 to 150 ms in C.

It costs ten times the CPU of the C code, for something that hardly ever comes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]  # the Python halves of the parser
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

#: Characters of encoded JSON that are handed on at a time.
BITE = 16 * 1024

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

Scan = Callable[[str, int], tuple[Any, int]]


def loads(message: bytes, checkpoint: Callable[[], object]) -> Any:
    """Parse as ``json.loads`` does, calling ``checkpoint`` before every value. Raises ``ValueError``, ``RecursionError``."""

    def slowly(scan: Scan) -> Scan:
        def breathing(text: str, index: int) -> tuple[Any, int]:
            checkpoint()
            return scan(text, index)

        return breathing

    decoder: Any = json.JSONDecoder()
    decoder.parse_array = lambda at, scan: JSONArray(at, slowly(scan))
    decoder.parse_object = lambda at, strict, scan, *rest: JSONObject(
        at, strict, slowly(scan), *rest
    )
    decoder.scan_once = py_make_scanner(decoder)
    return decoder.decode(message.decode())


def canonical_pieces(value: Any, checkpoint: Callable[[], object]) -> Iterator[bytes]:
    """Yield the canonical JSON of a parsed value piece by piece, calling ``checkpoint`` in between."""
    held: list[str] = []
    size = 0
    for text in _tokens(value):
        checkpoint()
        held.append(text)
        size += len(text)
        if size > BITE:
            yield "".join(held).encode()
            held, size = [], 0
    yield "".join(held).encode()


def _tokens(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        before = "{"
        for name in sorted(value):
            yield f"{before}{_encode(name)}:"
            yield from _tokens(value[name])
            before = ","
        yield "}" if value else "{}"
    elif isinstance(value, list):
        before = "["
        for item in value:
            yield before
            yield from _tokens(item)
            before = ","
        yield "]" if value else "[]"
    elif isinstance(value, str) and len(value) > BITE:
        yield '"'
        for start in range(0, len(value), BITE):
            yield _encode(value[start : start + BITE])[1:-1]
        yield '"'
    else:
        yield _encode(value)
