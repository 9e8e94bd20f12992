"""Redacts captured records and encodes them as JSON, for the flush loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from z4j_core.redaction.markers import REDACTED

from z4j_bare.events.redaction import Redactor
from z4j_bare.wire.fit import SHORT_ID_CHARS, has_nul, is_fit
from z4j_bare.wire.frames import encode_event, encode_fields

if TYPE_CHECKING:
    from z4j_celery.meta import TaskMeta
    from z4j_core.models import Event

#: Maximum characters of a traceback, as in the adapter's hooks.
MAX_TRACEBACK_CHARS = 4096

#: A captured record: its encoder (``None`` if the caller has chosen one), event kind, timestamp
#: (seconds since the epoch), task id, fields shared by all events of the task type, and the fields
#: of this event.
Record = tuple[Callable[[Any], bytes] | None, str, float, str, dict[str, Any], dict[str, Any]]

_encoder = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def new_ids() -> Callable[[], str]:
    """Return a function that returns a new UUID (version 4) at each call.

    ``uuid4`` is not used, because it takes more time than the rest of an event's envelope. Instead,
    the first ten bytes are random, and the last twelve digits are a counter. The counter starts at
    a number of twelve digits, so it needs no padding. At 1,000 events a second the counter lasts
    for 28 years.
    """
    prefix, numbers = str(uuid4())[:24], count(100_000_000_000)
    return lambda: f"{prefix}{next(numbers)}"


class Encoder:
    """Encodes records to canonical JSON.

    :param redactor: applied to ``args``, ``kwargs``, ``result`` and the texts of an error.
    """

    def __init__(self, engine: str, redactor: Redactor) -> None:
        self._engine = engine
        self._redactor = redactor
        self._new_id = new_ids()
        self._second = -1
        self._timestamp_format = ""

    def envelope(self, kind: str, timestamp: float, task_id: str, data: str) -> bytes:
        """Return the bytes of an event whose ``data`` is canonical JSON.

        :raises ValueError: :func:`encode_fields` must encode the event, because a text contains a
            lone surrogate or NUL, or the task id is long.
        """
        text = (
            f'{{"data":{data},"engine":"{self._engine}","id":"{self._new_id()}","kind":"{kind}",'
            f'"occurred_at":"{self._iso(timestamp)}","task_id":{encode_basestring(task_id)}}}'
        )
        if len(task_id) > SHORT_ID_CHARS or ("\\" in text and has_nul(text)):
            raise ValueError("the event may not fit into the brain's database")
        return text.encode()

    def __call__(self, record: Record) -> bytes:
        """Return the bytes of one event."""
        _, kind, timestamp, task_id, common, own = record
        data = self._data(common, own)
        try:
            if is_fit(data):
                return self.envelope(kind, timestamp, task_id, encode_text(data))
        except (TypeError, ValueError):  # encode_fields handles NaN and texts that must be changed
            pass
        return encode_fields(
            {
                "data": data,
                "engine": self._engine,
                "id": self._new_id(),
                "kind": kind,
                "occurred_at": self._iso(timestamp),
                "task_id": task_id,
            }
        )

    def _data(self, common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        data = {**common, **own}
        for name in _SCRUBBED:
            if own.get(name):  # an empty value needs no redaction
                data[name] = self._redactor.scrub(own[name])
        if "traceback" in own:
            data["traceback"] = _truncate_traceback(data["traceback"])
        meta = data.pop("_meta", None)
        if meta is not None:
            apply_task_meta(data, meta)
        return data

    def _iso(self, timestamp: float) -> str:
        # Formatting a datetime takes 1 us. Therefore the text of the last second is cached.
        second = int(timestamp)
        if second != self._second:
            self._second = second
            start = datetime.fromtimestamp(second, UTC).isoformat()[:19]
            self._timestamp_format = start + ".%06d+00:00"
        # %d truncates, so 0.5 is added to round. min() keeps the fraction below one second.
        return self._timestamp_format % min(999_999, (timestamp - second) * 1_000_000 + 0.5)


_SCRUBBED = ("args", "kwargs", "result", "exception_message", "traceback", "reason")


def _c_encode(encoder: json.JSONEncoder) -> Callable[[object], str]:
    """Return a function that works like ``encoder.encode`` and takes half the time.

    ``encode`` creates a C encoder at each call. The returned function uses one C encoder.
    """
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C module
        return encoder.encode
    run = make(
        None,  # no detection of cycles: snapshots are trees
        encoder.default,
        encode_basestring,
        encoder.indent,
        encoder.key_separator,
        encoder.item_separator,
        encoder.sort_keys,
        encoder.skipkeys,
        encoder.allow_nan,
    )
    return lambda data: "".join(run(data, 0))


#: Returns the canonical JSON of a plain value. Raises ``ValueError`` for NaN and infinity.
encode_text = _c_encode(_encoder)


def apply_task_meta(data: dict[str, Any], meta: TaskMeta) -> None:
    """Apply a task's ``@z4j_meta`` to the data of an event.

    The meta data name the keyword arguments to keep or to redact, and may redact the result.
    """
    if meta.keep_kwargs is not None:
        if data.get("args") is not None:
            data["args"] = REDACTED  # keep_kwargs cannot select positional arguments
        if isinstance(data.get("kwargs"), dict):
            data["kwargs"] = {
                key: item for key, item in data["kwargs"].items() if key in meta.keep_kwargs
            }
    for key in meta.redact_kwargs:
        if isinstance(data.get("kwargs"), dict) and key in data["kwargs"]:
            data["kwargs"][key] = REDACTED
    if meta.redact_result and "result" in data:
        data["result"] = REDACTED


def _truncate_traceback(text: object) -> object:
    if isinstance(text, str) and len(text) > MAX_TRACEBACK_CHARS:
        return text[:MAX_TRACEBACK_CHARS] + "\n[... traceback truncated ...]"
    return text


def encode_model(captured: tuple[Any, Event]) -> bytes:
    """Return the bytes of an event that was captured as a z4j_core model."""
    return encode_event(captured[1])
