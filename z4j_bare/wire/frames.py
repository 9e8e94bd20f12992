"""Encodes the payloads of outgoing frames. Shrinks payloads that are too large."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from z4j_core.schedule_external import EXTERNAL_SCHEDULE_RUNTIME_FEATURE
from z4j_core.version import PROTOCOL_VERSION

from z4j_bare.wire.canonical import canonical, canonical_plain, plain_text, sanitised_text
from z4j_bare.wire.fit import (
    MARK,
    NUL_MARK,
    fit_fields,
    fit_name,
    fitted,
    has_nul,
    replace_nul,
)

if TYPE_CHECKING:
    from z4j_core.models import Event

#: Maximum bytes of one encoded event: half of the brain's maximum frame size of 1 MiB.
MAX_EVENT_BYTES = 512 * 1024

#: Maximum bytes of an encoded result: a quarter of the brain's maximum frame size of 1 MiB.
#: A summary replaces a larger result.
MAX_RESULT_BYTES = 256 * 1024

#: Fields of an event's data that are replaced by a text with their size, in this order, until a
#: large event fits.
TRUNCATION_ORDER = ("traceback", "result", "args", "kwargs", "exception_message", "reason")

#: Maximum characters of a result's error text, as in z4j_core's model of the frame.
MAX_ERROR_CHARS = 8192

#: Number of characters of a result's error text that the brain stores.
STORED_ERROR_CHARS = 1024

#: Maximum number of numeric values in the summary of a result.
MAX_SUMMARY_NUMBERS = 50

#: Maximum characters of a key in the summary of a result.
MAX_KEY_CHARS = 64

#: Largest value that the brain's frame models allow in counters of rows and events.
MAX_COUNT = 10_000_000

#: Largest age of a row that the brain allows, in seconds (ten years).
#: A wrong clock can cause a larger age.
MAX_AGE = 315_360_000.0

#: Keys of a worker's details, in the order in which they are removed from a large heartbeat.
#: The brain keeps the previous value of a missing key.
DROPPABLE_WORKER_KEYS = ("active", "registered", "conf")

#: The runtime features that ``hello`` announces.
RUNTIME_FEATURES = ("retry_by_reference", EXTERNAL_SCHEDULE_RUNTIME_FEATURE)

_DETAILS_SUFFIX = ".worker_details"


@dataclass(frozen=True, slots=True)
class Identity:
    """The facts about this process in ``hello`` (``docs/protocol.md``, "Hello")."""

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


def encode_event(event: Event) -> bytes:
    """Return the canonical bytes of an adapter's ``Event``.

    An event that is too large is truncated and marked.
    """
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
    """Return the canonical bytes of an event's fields, fit for the brain's database.

    :param trusted: do not sanitise, because all values are JSON types with string keys.
    """
    encode = plain_text if trusted else sanitised_text
    fields, changed = fit_fields(fields)
    text = encode(fields)
    if has_nul(text):
        fields = json.loads(replace_nul(text))
        changed.append(NUL_MARK)
    if changed:
        fields["data"] = {**(fields.get("data") or {}), MARK: changed}
        fitted.update(changed)
        text = encode(fields)
    encoded = text.encode()
    return encoded if len(encoded) <= MAX_EVENT_BYTES else shrink_event(fields, MAX_EVENT_BYTES)


def shrink_event(fields: dict[str, Any], limit: int) -> bytes:
    """Return the event, truncated to at most ``limit`` bytes.

    The fields of ``TRUNCATION_ORDER`` are replaced one by one, until the event fits. The
    replacement states the size of the field. If the event still does not fit, its data keep only
    task name, queue and worker.
    """
    data = dict(fields.get("data") or {})
    encoded = b""
    for name in TRUNCATION_ORDER:
        if name in data:
            data[name] = f"[... {len(canonical(data[name]))} bytes cut]"
        encoded = canonical({**fields, "data": data})
        if len(encoded) <= limit:
            return encoded
    names = {
        name: fit_name(data[name])
        for name in ("task_name", "queue", "worker")
        if isinstance(data.get(name), str)
    }
    mark = {MARK: data[MARK]} if MARK in data else {}
    return canonical(
        {**fields, "data": {**names, **mark, "cut": f"[... {len(encoded)} bytes cut]"}}
    )


def event_batch(events: Sequence[bytes]) -> bytes:
    """Return the payload of an ``event_batch``. Each event is canonical JSON.

    The brain acknowledges an empty batch as well. Such an ack shows that all earlier frames of the
    connection were processed.
    """
    return b'{"events":[' + b",".join(events) + b"]}"


def registry_delta(
    engine: str, added: Sequence[bytes], removed: Sequence[str], updated: Sequence[bytes]
) -> bytes:
    """Return the payload of a ``registry_delta``. Each task definition is canonical JSON."""
    lists = b",".join(added), canonical(engine[:40]), canonical(list(removed)), b",".join(updated)
    return b'{"added":[%b],"engine":%b,"removed":%b,"updated":[%b]}' % lists


def command_ack(token: str | None) -> bytes:
    """Return the payload of a ``command_ack``.

    ``token`` is the delivery token that came with the command.
    """
    return canonical({"delivery_claim_token": token} if token else {})


def command_result(
    status: str, result: Mapping[str, Any] | None, error: str | None, token: str | None
) -> bytes:
    """Return the payload of a ``command_result``. A summary replaces a result that is too large."""
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
    return canonical({**body, "result": summarise_result(result, why)})


def summarise_result(result: Mapping[str, Any] | None, why: str) -> dict[str, Any]:
    """Return a summary of a result that cannot be sent: its numeric values and the reason ``why``.

    The command's status does not change. If a successful command were reported as failed, the
    command would be repeated, and the brain would disable the schedule that issued the command.
    """
    items = (
        item
        for item in (result or {}).items()
        if isinstance(item[0], str) and len(item[0]) <= MAX_KEY_CHARS
    )
    numbers = ((key, value) for key, value in items if isinstance(value, (bool, int, float)))
    kept = dict(islice(numbers, MAX_SUMMARY_NUMBERS))
    return {**kept, "shortened": True, "why": f"the result is {why}"}


def shrink_result(payload: bytes) -> Iterator[bytes]:
    """Yield versions of a result, each smaller than the previous one.

    First the error text is shortened. Then a summary replaces the result. Then the values of the
    summary are removed.
    """
    body: dict[str, Any] = json.loads(payload)
    error = body.get("error")
    if isinstance(error, str) and len(error) > STORED_ERROR_CHARS:
        yield canonical_plain({**body, "error": error[:STORED_ERROR_CHARS]})
    why = f"of {len(payload)} bytes, more than this transport takes"
    note = f"{error[:200]} [... cut]" if isinstance(error, str) else None
    for result in (body.get("result"), None):
        yield canonical_plain({**body, "result": summarise_result(result, why), "error": note})


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
    """Return the payload of an ``agent_status``.

    :param streaks: consecutive failures before this session, as in ``ReconnectBackoff.streaks``.
    :param connected_at: start of the session, in seconds since the epoch. Ages are in seconds.
    """
    return canonical(
        {
            "auth_failure_streak": streaks.get("auth", 0),
            "protocol_failure_streak": streaks.get("protocol", 0),
            "connection_failure_streak": streaks.get("connection", 0),
            "last_successful_connect_at": datetime.fromtimestamp(connected_at, UTC).isoformat(),
            "current_session_age_seconds": round(max(0.0, session_age), 3),
            "buffer_depth": min(buffer_depth, MAX_COUNT),
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
    """Return the payload of a ``heartbeat``; ``last_flush_at`` is in seconds since the epoch."""
    flushed = (
        None if last_flush_at is None else datetime.fromtimestamp(last_flush_at, UTC).isoformat()
    )
    return canonical(
        {
            "buffer_size": min(buffer_size, MAX_COUNT),
            "last_flush_at": flushed,
            "dropped_events": min(dropped_events, MAX_COUNT),
            "telemetry_loss": dict(loss),
            # NUL is replaced inside the texts, because the brain parses some of them as JSON.
            "adapter_health": {key: replace_nul(str(value)) for key, value in health.items()},
        }
    )


def shrink_heartbeat(payload: bytes) -> Iterator[bytes]:
    """Yield versions of a heartbeat, each with less health data than the previous one."""
    beat: dict[str, Any] = json.loads(payload)
    health: dict[str, Any] = beat.get("adapter_health") or {}
    for dropped in DROPPABLE_WORKER_KEYS:
        health = {
            key: _without_key(dropped, value) if key.endswith(_DETAILS_SUFFIX) else value
            for key, value in health.items()
        }
        yield canonical_plain({**beat, "adapter_health": health})
    health = {key: value for key, value in health.items() if not key.endswith(_DETAILS_SUFFIX)}
    yield canonical_plain({**beat, "adapter_health": {**health, "z4j.cut": "worker_details"}})
    yield canonical_plain({**beat, "adapter_health": {"z4j.cut": "adapter_health"}})


def _without_key(dropped: str, details: Any) -> Any:
    """Remove the key ``dropped`` of every worker from the details of all workers (a JSON text).

    Any other value is returned unchanged.
    """
    try:
        workers = json.loads(details)
        reduced = {
            name: {key: value for key, value in worker.items() if key != dropped}
            for name, worker in workers.items()
        }
    except (ValueError, TypeError, AttributeError):
        return details
    return json.dumps(reduced, separators=(",", ":"))
