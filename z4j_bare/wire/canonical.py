"""Canonical JSON (``brain-contract`` 2.1) and the sanitiser that makes any value fit for it.

A frame whose bytes do not survive a parse and a second encoding on the brain's side fails its signature (4403) or the
parser (1011), and takes the session with it. So everything that is not plain JSON is made plain here, before signing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

#: Python's ``json`` refuses integers over 4,300 digits on parsing (``sys.set_int_max_str_digits``); far below that, no
#: database column or dashboard shows them either.
MAX_INT_BITS = 1024

#: The brain's redaction replaces anything nested deeper than 64 levels; an event's own envelope takes four of them.
MAX_DEPTH = 60

_encode = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


def canonical(value: Any) -> bytes:
    """Return the canonical JSON of any value, made plain first."""
    return _encode(plain(value)).encode()


def canonical_plain(value: Any) -> bytes:
    """Return the canonical JSON of a value that is plain already: string keys, no foreign objects.

    Lone surrogates and non-finite floats are caught by the encoder itself and sent through :func:`plain`.
    """
    try:
        return _encode(value).encode()
    except ValueError:  # UnicodeEncodeError is one too
        return canonical(value)


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return ``value`` as JSON types that encode the same way before and after a round trip."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        number = int(value)
        return (
            number
            if number.bit_length() <= MAX_INT_BITS
            else f"<int of {number.bit_length()} bits>"
        )
    if isinstance(value, float):
        number_ = float(value)
        return number_ if math.isfinite(number_) else str(number_)
    if depth <= 0:
        return "<nested too deep>"
    if isinstance(value, Mapping):
        return _object(value, depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, depth - 1) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    return _text(_describe(value))


def _object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    # Keys 1 and "1" would both be sent, and the brain's parser keeps one: then the signature no longer matches.
    result: dict[str, Any] = {}
    for key, item in value.items():
        result[_text(key if isinstance(key, str) else _describe(key))] = plain(item, depth - 1)
    return result


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        return str(value).encode(errors="replace").decode()
    return str.__str__(value)


def _describe(value: Any) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__module__}.{type(value).__qualname__}>"
