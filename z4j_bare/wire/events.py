"""One event as the brain reads it (``brain-contract`` 2.5, section 5), as bytes that are made once and never again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.wire.canonical import canonical, canonical_plain

if TYPE_CHECKING:
    from z4j_core.models import Event

#: Bytes. A frame carries at most 128 KiB unless one event alone is larger; half the brain's 1 MiB frame keeps that legal.
MAX_EVENT_BYTES = 512 * 1024

#: What an event gives up first when it is too large; the row on the brain stays useful without them.
EXPENDABLE = ("traceback", "result", "args", "kwargs", "exception_message", "reason")


def encode_event(event: Event) -> bytes:
    """Return the canonical bytes of an adapter's ``Event``; too large ones are cut and marked."""
    return encode_fields(
        {
            "id": str(event.id),
            "kind": str(event.kind.value),
            "engine": event.engine,
            "task_id": event.task_id,
            "occurred_at": event.occurred_at.isoformat(),
            "data": event.data,
        }
    )


def encode_fields(fields: dict[str, Any], *, trusted: bool = False) -> bytes:
    """Return the canonical bytes of an event dictionary.

    ``trusted`` says that the values are plain JSON with string keys already and saves the sanitiser's walk.
    """
    encoded = canonical_plain(fields) if trusted else canonical(fields)
    return encoded if len(encoded) <= MAX_EVENT_BYTES else shrink(fields, MAX_EVENT_BYTES)


def shrink(fields: dict[str, Any], limit: int) -> bytes:
    """Return the event in at most ``limit`` bytes: expendable data goes first, each leaving a mark in its place."""
    data = dict(fields.get("data") or {})
    encoded = b""
    for name in EXPENDABLE:
        if name in data:
            data[name] = f"[... {len(canonical(data[name]))} bytes cut]"
        encoded = canonical({**fields, "data": data})
        if len(encoded) <= limit:
            return encoded
    kept = {
        name: data[name]
        for name in ("task_name", "queue", "worker")
        if isinstance(data.get(name), str)
    }
    kept = {name: value[:200] for name, value in kept.items()}  # the brain's column width (5.8)
    return canonical({**fields, "data": {**kept, "cut": f"[... {len(encoded)} bytes cut]"}})
