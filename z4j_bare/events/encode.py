"""From a captured tuple to the event's bytes: redaction and JSON, on the flush loop's time."""

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
from z4j_bare.wire.frames import encode_event, encode_fields

if TYPE_CHECKING:
    from z4j_core.models import Event

#: Characters of a traceback, as the adapter's own hooks send it.
TRACEBACK = 4096

#: Combinations of task name, queue and worker whose constant part is remembered.
REMEMBERED = 4096

_encoder = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)

#: Its encoder, kind of event, stamp (seconds since the epoch), task id, fields common to all events of that kind of task,
#: fields of its own.
Record = tuple[Callable[[Any], bytes] | None, str, float, str, dict[str, Any], dict[str, Any]]


def new_ids() -> Callable[[], str]:
    """Return a source of UUIDs of version 4: random in their first ten bytes, counted in the last twelve digits.

    One ``uuid4`` per event costs more than the rest of its envelope. Decimal digits will do, and need no filling up if the
    first number has them all; they last 28,000 years at 1,000 events a second.
    """
    prefix, numbers = str(uuid4())[:24], count(100_000_000_000)
    return lambda: f"{prefix}{next(numbers)}"


class Encoder:
    """Turns records into canonical event bytes.

    :param redactor: applied to ``args``, ``kwargs``, ``result`` and the texts of an error.
    """

    def __init__(self, engine: str, redactor: Redactor) -> None:
        self._engine = engine
        self._redactor = redactor
        self._new_id = new_ids()
        self._second = -1
        self._timestamp_format = ""

    def envelope(self, kind: str, stamp: float, task_id: str, data: str) -> bytes:
        """Return the bytes of an event whose data are canonical JSON already.

        Raises ``ValueError`` for text with a lone surrogate.
        """
        return (
            f'{{"data":{data},"engine":"{self._engine}","id":"{self._new_id()}","kind":"{kind}",'
            f'"occurred_at":"{self._iso(stamp)}","task_id":{encode_basestring(task_id)}}}'
        ).encode()

    def __call__(self, record: Record) -> bytes:
        """Return the bytes of one event."""
        _, kind, stamp, task_id, common, own = record
        try:
            return self.envelope(kind, stamp, task_id, encode_text(self._data(common, own)))
        except ValueError:  # a lone surrogate or a NaN: the sanitiser's business
            return encode_fields(
                {
                    "data": self._data(common, own),
                    "engine": self._engine,
                    "id": self._new_id(),
                    "kind": kind,
                    "occurred_at": self._iso(stamp),
                    "task_id": task_id,
                }
            )

    def _data(self, common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        data = {**common, **own}
        for name in _SCRUBBED:
            if own.get(name):  # what is empty hides nothing
                data[name] = self._redactor.scrub(own[name])
        if "traceback" in own:
            data["traceback"] = _traceback(data["traceback"])
        meta = data.pop("_meta", None)
        if meta is not None:
            apply_task_meta(data, meta)
        return data

    def _iso(self, stamp: float) -> str:
        # Formatting a datetime costs a microsecond; within one second only the fraction changes.
        second = int(stamp)
        if second != self._second:
            self._second = second
            self._timestamp_format = (
                datetime.fromtimestamp(second, UTC).isoformat()[:19] + ".%06d+00:00"
            )
        # The format cuts, and so rounds; never up to the next second.
        return self._timestamp_format % min(999_999, (stamp - second) * 1_000_000 + 0.5)


_SCRUBBED = ("args", "kwargs", "result", "exception_message", "traceback", "reason")


def _c_encode(encoder: json.JSONEncoder) -> Callable[[Any], str]:
    """Return ``encoder.encode`` for trees, without the set-up that it repeats at each call, half of its time."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C module
        return encoder.encode
    run = make(
        None,  # no look for circles: snapshots are trees
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


#: Return canonical JSON of plain values. Raises ``ValueError`` for a float that is no number.
encode_text = _c_encode(_encoder)


def apply_task_meta(data: dict[str, Any], meta: Any) -> None:
    """Apply a task's ``@z4j_meta``: kept and redacted keyword arguments, a hidden result."""
    if meta.keep_kwargs is not None:
        if data.get("args") is not None:
            data["args"] = REDACTED  # positions have no names to keep them by
        if isinstance(data.get("kwargs"), dict):
            data["kwargs"] = {
                key: item for key, item in data["kwargs"].items() if key in meta.keep_kwargs
            }
    for key in meta.redact_kwargs:
        if isinstance(data.get("kwargs"), dict) and key in data["kwargs"]:
            data["kwargs"][key] = REDACTED
    if meta.redact_result and "result" in data:
        data["result"] = REDACTED


def _traceback(text: Any) -> Any:
    if isinstance(text, str) and len(text) > TRACEBACK:
        return text[:TRACEBACK] + "\n[... traceback truncated ...]"
    return text


def encode_model(captured: tuple[Any, Event]) -> bytes:
    """Return the bytes of an event that came as z4j_core's model, captured with this function."""
    return encode_event(captured[1])
