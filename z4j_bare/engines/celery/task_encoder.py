"""Encodes the records of the signal handlers as JSON events, in the flush loop.

A line of code takes three times as long in a signal handler as in this module, because the
handler's code and data are not in the CPU cache. Therefore a handler records only values that may
change. The flush loop encodes up to 256 records in a row.
"""

from __future__ import annotations

from json.encoder import encode_basestring
from typing import Any

from z4j_bare.engines.celery.masks import shown_args, shown_kwargs
from z4j_bare.engines.celery.task_state import RECEIVED, STARTED, SUCCEEDED, TaskState
from z4j_bare.events.encode import Encoder, encode_text
from z4j_bare.events.redaction import Redactor
from z4j_bare.events.ring import Captured
from z4j_bare.events.task_counts import TaskCell, TaskCounts
from z4j_bare.wire.fit import SHORT_ID_CHARS, is_fit

#: Maximum number of cached templates, one for each task name and queue.
MAX_TEMPLATES = 4096


class _Template:
    """JSON shared by all events of one task name and queue.

    ``data`` is the complete data of ``task.started``. ``queue`` and ``tail`` are parts of the data
    of other events. The constructor raises ``ValueError`` if a name must be cut.
    """

    __slots__ = ("data", "queue", "tail")

    def __init__(self, fields: dict[str, Any], queue: str | None, worker: str | None) -> None:
        if not is_fit({**fields, "queue": queue, "worker": worker}):
            raise ValueError("a name is too long for the brain's database")
        self.data = encode_text({**fields, "worker": worker, "queue": queue})
        self.queue = f'"queue":{encode_text(queue)}'
        self.tail = (
            f'"task_name":{encode_text(fields["task_name"])},"worker":{encode_text(worker)}}}'
        )


class TaskEncoder:
    """Encodes the records of one worker's tasks in the order of the ring.

    The encoder also assigns the timestamps, because a task's timestamps must not decrease in the
    order of the ring. The events received, started and succeeded are joined from pieces of JSON
    text, because encoding a dictionary takes twice as long. :class:`Encoder` encodes other events,
    tasks with ``@z4j_meta``, and values that the brain cannot store.

    :param counts: counts the events; default: counts that nothing reads.
    """

    def __init__(
        self,
        engine: str,
        redactor: Redactor,
        worker: str | None,
        counts: TaskCounts | None = None,
    ) -> None:
        self.encode = Encoder(engine, redactor)
        self._engine = engine
        self._counts = counts or TaskCounts()
        self._scrub = redactor.scrub
        self._is_sensitive_key = redactor.is_sensitive_key
        self._worker = worker
        self._templates: dict[tuple[str, str | None], _Template] = {}

    def received(self, record: Captured) -> bytes:
        """Encode ``(_, now, task_id, task_state, args, kwargs, parent_id, root_id, texts)``.

        ``args`` and ``kwargs`` are ``None`` if arguments are not captured.
        """
        task_state = record[3]
        self._cell(task_state).received += 1
        return self._received(task_state.next_timestamp(record[1], RECEIVED), record)

    def started(self, record: Captured) -> bytes:
        """Encode ``(_, now, task_id, task_state)``."""
        _, now, task_id, task_state = record
        cell = self._cell(task_state)
        cell.started += 1
        if task_state.last_timestamp:
            cell.add_delay(now - task_state.last_timestamp)
        timestamp = task_state.next_timestamp(now, STARTED)
        try:
            data = self._template(task_state).data
            return self.encode.envelope(STARTED, timestamp, task_id, data)
        except ValueError:
            own = {"worker": self._worker, "queue": task_state.queue}
            fields = task_state.task_type.fields
            return self.encode((None, STARTED, timestamp, task_id, fields, own))

    def succeeded(self, record: Captured) -> bytes:
        """Encode ``(_, now, task_id, task_state, ended, has_result, result)``.

        :meth:`generic` describes ``ended``.
        """
        _, now, task_id, task_state, ended, has_result, result = record
        if task_state.task_type.meta is not None:
            own = {"result": result} if has_result else {}
            return self.generic((None, now, task_id, task_state, SUCCEEDED, own, ended))
        cell = self._cell(task_state)
        cell.succeeded += 1
        if task_state.started_at:
            cell.add_runtime(ended - task_state.started_at)
        timestamp = task_state.next_timestamp(now)
        try:
            template = self._template(task_state)
            shown = f',"result":{self._result_json(result)}' if has_result else ""
            runtime = (
                f',"runtime_ms":{_runtime(task_state, ended)}' if task_state.started_at else ""
            )
            return self.encode.envelope(
                SUCCEEDED, timestamp, task_id, f"{{{template.queue}{shown}{runtime},{template.tail}"
            )
        except ValueError:
            own = {"result": result} if has_result else {}
            return self._encode(
                SUCCEEDED, timestamp, record, self._complete(own, task_state, ended)
            )

    def generic(self, record: Captured) -> bytes:
        """Encode ``(_, now, task_id, task_state, kind, own, ended)``.

        ``own`` are the event's own fields. ``ended`` is the performance counter at the end of the
        run, or ``None`` if the event does not end the run.
        """
        _, now, _, task_state, kind, own, ended = record
        cell = self._cell(task_state)
        cell.add(kind, own)
        if kind == SUCCEEDED and ended is not None and task_state.started_at:
            cell.add_runtime(ended - task_state.started_at)
        timestamp = task_state.next_timestamp(now, kind)
        return self._encode(kind, timestamp, record, self._complete(own, task_state, ended))

    def rejected(self, record: Captured) -> bytes:
        """Encode ``(_, kind, timestamp, task_id, common, own)`` of a rejected message."""
        self._counts.cell(self._engine, self._worker, record[5]["task_name"], None).rejected += 1
        return self.encode(record)

    def _cell(self, task_state: TaskState) -> TaskCell:
        task_type, queue = task_state.task_type, task_state.queue
        cell = task_type.counts.get(queue)
        if cell is None:
            cell = self._counts.cell(self._engine, self._worker, task_type.name, queue)
            task_type.counts[queue] = cell
        return cell

    def _received(self, timestamp: float, record: Captured) -> bytes:
        _, _, task_id, task_state, args, kwargs, parent, root, texts = record
        if texts is not None:
            args = shown_args(args, texts[0], self._is_sensitive_key)
            kwargs = shown_kwargs(kwargs, texts[1], self._is_sensitive_key)
        if task_state.task_type.meta is None:
            try:
                template, sent = self._template(task_state), ""
                if args is not None:
                    sent = (
                        f'"args":{self._scrubbed(args, "[]")},'
                        f'"kwargs":{self._scrubbed(kwargs, "{}")},'
                    )
                above = f'"parent_task_id":{encode_basestring(parent)},' if parent else ""
                top = f'"root_task_id":{encode_basestring(root)},' if root else ""
                if len(above) + len(top) > SHORT_ID_CHARS:
                    raise ValueError("an id may be too long for the brain's database")
                data = f"{{{sent}{above}{template.queue},{top}{template.tail}"
                return self.encode.envelope(RECEIVED, timestamp, task_id, data)
            except (TypeError, ValueError):  # Encoder changes values that the brain cannot store
                pass
        own: dict[str, Any] = {} if args is None else {"args": args, "kwargs": kwargs}
        if parent:
            own["parent_task_id"] = str(parent)
        if root:
            own["root_task_id"] = str(root)
        return self._encode(RECEIVED, timestamp, record, self._complete(own, task_state, None))

    def _scrubbed(self, value: list[Any] | dict[str, Any], empty: str) -> str:
        return encode_text(self._scrub(value)) if value else empty

    def _result_json(self, result: object) -> str:
        if result is None:
            return "null"
        return encode_text(self._scrub(result) if result else result)

    def _complete(
        self, own: dict[str, Any], task_state: TaskState, ended: float | None
    ) -> dict[str, Any]:
        """Return an event's own fields with the worker, the queue, the runtime and the meta."""
        own = {**own, "worker": self._worker, "queue": task_state.queue}
        if ended is not None and task_state.started_at:
            own["runtime_ms"] = _runtime(task_state, ended)
        if task_state.task_type.meta is not None:
            own["_meta"] = task_state.task_type.meta
        return own

    def _encode(self, kind: str, timestamp: float, record: Captured, own: dict[str, Any]) -> bytes:
        return self.encode((None, kind, timestamp, record[2], record[3].task_type.fields, own))

    def _template(self, task_state: TaskState) -> _Template:
        key = (task_state.task_type.name, task_state.queue)
        template = self._templates.get(key)
        if template is None:
            if len(self._templates) >= MAX_TEMPLATES:
                self._templates.clear()
            template = self._templates[key] = _Template(
                task_state.task_type.fields, task_state.queue, self._worker
            )
        return template


def _runtime(task_state: TaskState, ended: float) -> int:
    return int((ended - task_state.started_at) * 1000)
