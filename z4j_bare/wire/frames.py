"""Builders: the payloads of the frames that an agent sends, as canonical bytes. Signing is the session's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from secrets import token_hex
from typing import Any

from z4j_core.schedule_external import EXTERNAL_SCHEDULE_RUNTIME_FEATURE
from z4j_core.version import PROTOCOL_VERSION

from z4j_bare.wire.canonical import canonical

#: A result's error text: the frame model's limit, and what the brain's row keeps of it (2.8).
MAX_ERROR_CHARS = 8192
ERROR_CHARS = 1024

#: Bytes of a result; beyond, a short one is sent that says so. A quarter of the brain's 1 MiB frame.
MAX_RESULT_BYTES = 256 * 1024

#: Numbers that are kept of a result which is too large, and characters of their keys.
MAX_FIGURES = 50
MAX_KEY = 64

#: Seconds; the brain's limit for an age, ten years. A clock that was wrong can make older rows.
MAX_AGE = 315_360_000.0

RUNTIME_FEATURES = ("retry_by_reference", EXTERNAL_SCHEDULE_RUNTIME_FEATURE)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is, as ``hello`` tells it (``brain-contract`` 1.3)."""

    framework: str
    agent_version: str
    worker_id: str
    worker_pid: int
    worker_started_at: datetime
    worker_role: str | None = None
    agent_name: str | None = None
    engines: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()
    capabilities: Mapping[str, Sequence[str]] = field(default_factory=dict)
    runtime_features: tuple[str, ...] = RUNTIME_FEATURES


def frame_id(prefix: str) -> str:
    """Return a new frame id such as ``ev_9f86d081884c7d65``."""
    return f"{prefix}_{token_hex(8)}"


def hello(identity: Identity) -> bytes:
    """Return the unsigned ``hello`` frame."""
    payload: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "agent_version": identity.agent_version,
        "framework": identity.framework,
        "engines": list(identity.engines),
        "schedulers": list(identity.schedulers),
        "capabilities": {name: list(tokens) for name, tokens in identity.capabilities.items()},
        "host": {"name": identity.agent_name} if identity.agent_name else {},
        "worker_id": identity.worker_id,
        "worker_role": identity.worker_role,
        "worker_pid": identity.worker_pid,
        "worker_started_at": identity.worker_started_at.isoformat(),
        "runtime_features": list(identity.runtime_features),
    }
    return canonical({"v": 2, "type": "hello", "id": frame_id("hello"), "payload": payload})


def event_batch(events: Sequence[bytes]) -> bytes:
    """Return the payload of an ``event_batch`` around events that are canonical bytes already.

    With no events it is a receipt request: the brain handles one connection's frames in order and acknowledges even an
    empty batch (2.4), so its ack proves that whatever was sent before it has been dealt with.
    """
    return b'{"events":[' + b",".join(events) + b"]}"


def registry_delta(
    engine: str, added: Sequence[bytes], removed: Sequence[str], updated: Sequence[bytes]
) -> bytes:
    """Return the payload of a ``registry_delta`` around definitions that are canonical JSON already."""
    lists = b",".join(added), canonical(engine[:40]), canonical(list(removed)), b",".join(updated)
    return b'{"added":[%b],"engine":%b,"removed":%b,"updated":[%b]}' % lists


def command_ack(token: str | None) -> bytes:
    """Return the payload of a ``command_ack``; the delivery token is echoed unchanged (2.8)."""
    return canonical({"delivery_claim_token": token} if token else {})


def command_result(
    status: str, result: Mapping[str, Any] | None, error: str | None, token: str | None
) -> bytes:
    """Return the payload of a ``command_result`` that always fits: of too large a result only the numbers are sent."""
    body = {
        "status": status,
        "result": None if result is None else dict(result),
        "error": None if error is None else error[:MAX_ERROR_CHARS],
        "delivery_claim_token": token,
    }
    encoded = canonical(body)
    if len(encoded) <= MAX_RESULT_BYTES:
        return encoded
    why = f"of {len(encoded)} bytes, over the limit of {MAX_RESULT_BYTES}"
    return canonical({**body, "result": shortened(result, why)})


def shortened(result: Mapping[str, Any] | None, why: str) -> dict[str, Any]:
    """Return what is sent in place of a result that cannot be: its numbers, such as how many tasks were retried, and why.

    The status stays: what has been done and is told as a failure gets done again, and the brain stops a schedule whose
    firing "failed" (4.6).
    """
    items = (
        item
        for item in (result or {}).items()
        if isinstance(item[0], str) and len(item[0]) <= MAX_KEY
    )
    numbers = ((key, value) for key, value in items if isinstance(value, (bool, int, float)))
    return {**dict(islice(numbers, MAX_FIGURES)), "shortened": True, "why": f"the result is {why}"}


def agent_status(
    *,
    streaks: Mapping[str, int],
    connected_at: float,
    session_age: float,
    buffer_depth: int,
    oldest_age: float | None,
    identity: Identity,
    loss: Mapping[str, Any],
) -> bytes:
    """Return the payload of an ``agent_status`` (2.7); ``streaks`` are failures in a row, by ``Backoff``'s names."""
    return canonical(
        {
            "auth_failure_streak": streaks.get("auth", 0),
            "protocol_failure_streak": streaks.get("protocol", 0),
            "connection_failure_streak": streaks.get("connection", 0),
            "last_successful_connect_at": datetime.fromtimestamp(connected_at, UTC).isoformat(),
            "current_session_age_seconds": round(max(0.0, session_age), 3),
            "buffer_depth": min(buffer_depth, 10_000_000),
            "buffer_oldest_age_seconds": None
            if oldest_age is None
            else round(min(oldest_age, MAX_AGE), 3),
            "agent_version": identity.agent_version[:40],
            "protocol_version": PROTOCOL_VERSION,
            "engines": list(identity.engines[:32]),
            "schedulers": list(identity.schedulers[:32]),
            "telemetry_loss": dict(loss),
        }
    )


def heartbeat(
    *,
    buffer_size: int,
    dropped_events: int,
    last_flush_at: float | None,
    loss: Mapping[str, Any],
    health: Mapping[str, str],
) -> bytes:
    """Return the payload of a ``heartbeat``; ``last_flush_at`` in seconds since the epoch."""
    flushed = (
        None if last_flush_at is None else datetime.fromtimestamp(last_flush_at, UTC).isoformat()
    )
    return canonical(
        {
            "buffer_size": min(buffer_size, 10_000_000),
            "last_flush_at": flushed,
            "dropped_events": min(dropped_events, 10_000_000),
            "telemetry_loss": dict(loss),
            "adapter_health": {key: str(value) for key, value in health.items()},
        }
    )
