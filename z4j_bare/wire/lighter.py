"""Smaller and smaller versions of a payload that is too large for the line, each still worth sending."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from z4j_bare.wire.canonical import canonical_plain
from z4j_bare.wire.frames import ERROR_CHARS, shortened

#: Keys of one worker's details, in the order in which they go. The brain keeps what it knew of a key that is absent (2.6).
WORKER_PARTS = ("active", "registered", "conf")

_DETAILS = ".worker_details"


def shrink_heartbeat(payload: bytes) -> Iterator[bytes]:
    """Yield a heartbeat without its workers' details, one part after the other, at last without any health figures."""
    beat: dict[str, Any] = json.loads(payload)
    health: dict[str, Any] = beat.get("adapter_health") or {}
    for part in WORKER_PARTS:
        health = {
            key: _without(part, value) if key.endswith(_DETAILS) else value
            for key, value in health.items()
        }
        yield canonical_plain({**beat, "adapter_health": health})
    health = {key: value for key, value in health.items() if not key.endswith(_DETAILS)}
    yield canonical_plain({**beat, "adapter_health": {**health, "z4j.cut": "worker_details"}})
    yield canonical_plain({**beat, "adapter_health": {"z4j.cut": "adapter_health"}})


def shrink_result(payload: bytes) -> Iterator[bytes]:
    """Yield a result with a short error text, then one that keeps its numbers, then one that says only how it ended."""
    body: dict[str, Any] = json.loads(payload)
    error = body.get("error")
    if isinstance(error, str) and len(error) > ERROR_CHARS:
        yield canonical_plain({**body, "error": error[:ERROR_CHARS]})
    why = f"of {len(payload)} bytes, more than this transport takes"
    note = f"{error[:200]} [... cut]" if isinstance(error, str) else None
    for result in (body.get("result"), None):
        yield canonical_plain({**body, "result": shortened(result, why), "error": note})


def _without(part: str, details: Any) -> Any:
    """Return the JSON text of a worker table without one key of each worker; anything else as it is."""
    try:
        table = json.loads(details)
        slim = {
            name: {key: value for key, value in each.items() if key != part}
            for name, each in table.items()
        }
    except (ValueError, TypeError, AttributeError):
        return details
    return json.dumps(slim, separators=(",", ":"))
