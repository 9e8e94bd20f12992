"""The second half of a capture: what a handler has noted becomes an event, on the flush loop's time.

A handler runs between two pieces of the host's code and finds cold caches: there, every line costs three times what it
costs here, where 256 notes are written up in a row. So a handler notes what may change or be gone by then, and no more.
"""

from __future__ import annotations

from json.encoder import encode_basestring
from typing import Any

from z4j_bare.engines.celery.task_state import RECEIVED, STARTED, SUCCEEDED, TaskState
from z4j_bare.events.encode import REMEMBERED, Encoder, encode_text
from z4j_bare.events.redaction import Redactor


class _Place:
    """What all events of one task name and queue have in common, as JSON: all of a start's data, and its parts."""

    __slots__ = ("data", "queue", "rest")

    def __init__(self, fields: dict[str, Any], queue: str | None, worker: str | None) -> None:
        self.data = encode_text({**fields, "worker": worker, "queue": queue})
        self.queue = f'"queue":{encode_text(queue)}'
        self.rest = (
            f'"task_name":{encode_text(fields["task_name"])},"worker":{encode_text(worker)}}}'
        )


class TaskEncoder:
    """Writes up the notes of one worker's tasks, in the order of the ring, in which a task's stamps grow.

    The usual three events are spliced from text, which takes half the time of a dictionary; a test holds them equal to what
    :class:`Encoder` makes of the same fields, as it does for tasks with annotations and for text that is no text.

    :param worker: the name that the brain knows; ``None`` in a process that is no worker.
    """

    def __init__(self, engine: str, redactor: Redactor, worker: str | None) -> None:
        self.encode = Encoder(engine, redactor)
        self._scrub = redactor.scrub
        self._worker = worker
        self._places: dict[tuple[str, str | None], _Place] = {}

    def received(self, note: Any) -> bytes:
        """Write up ``(_, now, task_id, task_state, args, kwargs, parent_id, root_id)``; no ``args`` and ``kwargs``: not sent."""
        return self._received(note[3].stamp(note[1], RECEIVED), note)

    def at_once(self, note: Any) -> tuple[Any, ...]:
        """Return the note of a task that comes with its stamp given now: for tracks that others stamp meanwhile."""
        return (
            (self._stamped, note[3].stamp(note[1], RECEIVED), note)
            if note[0] == self.received
            else note
        )

    def started(self, note: Any) -> bytes:
        """Write up ``(_, now, task_id, task_state)``."""
        _, now, task_id, task_state = note
        stamp = task_state.stamp(now, STARTED)
        try:
            return self.encode.envelope(STARTED, stamp, task_id, self._place(task_state).data)
        except ValueError:
            own = {"worker": self._worker, "queue": task_state.queue}
            return self.encode((None, STARTED, stamp, task_id, task_state.kind.fields, own))

    def succeeded(self, note: Any) -> bytes:
        """Write up ``(_, now, task_id, task_state, ended, has_result, result)``; ``ended`` as :meth:`other`."""
        _, now, task_id, task_state, ended, has_result, result = note
        if task_state.kind.meta is not None:
            return self.other(
                (
                    None,
                    now,
                    task_id,
                    task_state,
                    SUCCEEDED,
                    {"result": result} if has_result else {},
                    ended,
                )
            )
        stamp = task_state.stamp(now)
        try:
            place = self._place(task_state)
            shown = f',"result":{self._shown(result)}' if has_result else ""
            runtime = f',"runtime_ms":{_runtime(task_state, ended)}' if task_state.began else ""
            return self.encode.envelope(
                SUCCEEDED, stamp, task_id, f"{{{place.queue}{shown}{runtime},{place.rest}"
            )
        except ValueError:
            own = {"result": result} if has_result else {}
            return self._plain(SUCCEEDED, stamp, note, self._finish(own, task_state, ended))

    def other(self, note: Any) -> bytes:
        """Write up ``(_, now, task_id, task_state, kind, own, ended)``; ``ended``: performance counter, or ``None``."""
        _, now, _, task_state, kind, own, ended = note
        return self._plain(
            kind, task_state.stamp(now, kind), note, self._finish(own, task_state, ended)
        )

    def _stamped(self, note: Any) -> bytes:
        return self._received(note[1], note[2])

    def _received(self, stamp: float, note: Any) -> bytes:
        _, _, task_id, task_state, args, kwargs, parent, root = note
        if task_state.kind.meta is None:
            try:
                place, sent = self._place(task_state), ""
                if args is not None:
                    sent = f'"args":{self._scrubbed(args, "[]")},"kwargs":{self._scrubbed(kwargs, "{}")},'
                above = f'"parent_task_id":{encode_basestring(parent)},' if parent else ""
                top = f'"root_task_id":{encode_basestring(root)},' if root else ""
                data = f"{{{sent}{above}{place.queue},{top}{place.rest}"
                return self.encode.envelope(RECEIVED, stamp, task_id, data)
            except (
                TypeError,
                ValueError,
            ):  # ids that are no text are the sanitiser's business, too
                pass
        own: dict[str, Any] = {} if args is None else {"args": args, "kwargs": kwargs}
        own |= {
            name: value
            for name, value in (("parent_task_id", parent), ("root_task_id", root))
            if value
        }
        return self._plain(RECEIVED, stamp, note, self._finish(own, task_state, None))

    def _scrubbed(self, value: Any, empty: str) -> str:
        return encode_text(self._scrub(value)) if value else empty  # what is empty hides nothing

    def _shown(self, result: Any) -> str:
        if result is None:
            return "null"
        return encode_text(self._scrub(result) if result else result)

    def _finish(
        self, own: dict[str, Any], task_state: TaskState, ended: float | None
    ) -> dict[str, Any]:
        own = {**own, "worker": self._worker, "queue": task_state.queue}
        if ended is not None and task_state.began:
            own["runtime_ms"] = _runtime(task_state, ended)
        if task_state.kind.meta is not None:
            own["_meta"] = task_state.kind.meta
        return own

    def _plain(self, kind: str, stamp: float, note: Any, own: dict[str, Any]) -> bytes:
        return self.encode((None, kind, stamp, note[2], note[3].kind.fields, own))

    def _place(self, task_state: TaskState) -> _Place:
        key = (task_state.kind.name, task_state.queue)
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= REMEMBERED:
                self._places.clear()
            place = self._places[key] = _Place(
                task_state.kind.fields, task_state.queue, self._worker
            )
        return place


def _runtime(task_state: TaskState, ended: float) -> int:
    return int((ended - task_state.began) * 1000)
