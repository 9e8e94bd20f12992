"""Reads the messages of a prefork worker's children, and adds events that only the parent sees."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from struct import Struct
from time import time
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.engines.celery.channel import ABSENT, PRESENT, ChannelWriter
from z4j_bare.engines.celery.kept_runs import KeptRuns
from z4j_bare.engines.celery.outcomes import failure_fields, run_key
from z4j_bare.engines.celery.prefork import (
    REPLACED,
    Codes,
    Note,
    NoteHandlers,
    decode_note,
    prefork,
)
from z4j_bare.engines.celery.queue_names import QueueNames
from z4j_bare.engines.celery.signals import SignalHandlers
from z4j_bare.engines.celery.task_encoder import TaskEncoder
from z4j_bare.engines.celery.task_state import (
    FAILED,
    RETRIED,
    REVOKED,
    SUCCEEDED,
    TaskState,
    TaskTypes,
)
from z4j_bare.events.redaction import Redactor, safe_name
from z4j_bare.events.ring import Captured, Put
from z4j_bare.events.snapshot import snapshot
from z4j_bare.interfaces import IEvent, IOpenRuns

if TYPE_CHECKING:
    from celery.app.task import Task
    from celery.worker.consumer import Consumer
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.task_counts import TaskCounts

logger = logging.getLogger("z4j.runtime.engines.celery.prefork_parent")

#: Seconds between two reads while messages arrive.
#: A wake-up of the parent costs more than reading ten messages.
GATHER_SECONDS = 0.1

#: Maximum seconds of one wait for a message while a child runs a task.
BUSY_WAIT = 1.0
#: Maximum seconds of one wait for a message while no child runs a task.
IDLE_WAIT = 30.0

#: Seconds from a child's disappearance until the parent itself reports the end of the child's run.
#: Within this time, a signal of Celery may report the end. The longer delay is for a pool without
#: an event loop, because such a pool reports a lost child after 10 s.
VANISHED_DELAY = 2.0
VANISHED_DELAY_BLOCKING = 13.0

#: Maximum seconds that the agent's stop waits until the last messages are read.
FINISH_TIMEOUT = 2.0

#: Maximum number of tasks that are remembered because the parent reported their end.
MAX_PARENT_ENDS = 1000

#: Messages of the events that report a run whose end Celery does not report.
_VANISHED = "the worker process died while it ran"
_RETURNED = "the worker process died while it ran; the message returned to its queue"

#: The fields of a request that :func:`run_key` reads: ``retries`` and ``replaced_task_nesting``.
Request = dict[str, int]

#: The request of a task's first run.
_FIRST: Request = {}

_MARK = Struct("<Q")


class OrderedNotes:
    """Keeps the records of the parent's handlers in order with the children's messages.

    Each record waits in a queue, and a mark with the record's number is written to the channel.
    When the reader reads the mark, it handles the record. If the pipe is full, no mark is written.
    Then the record is handled at the next mark, or when the channel is empty.
    """

    def __init__(self, writer: ChannelWriter) -> None:
        self._writer = writer
        self._notes: deque[tuple[int, Captured]] = deque()
        self._numbers = count(1)

    def put(self, record: Captured) -> None:
        """Add a record. Does not wait."""
        number = next(self._numbers)
        self._notes.append((number, record))
        self._writer.mark(_MARK.pack(number))

    def last(self) -> int:
        """Return the number of the last record, or 0 if there is no record."""
        try:
            return self._notes[-1][0]
        except IndexError:
            return 0

    def take(self, until: int) -> Iterator[Captured]:
        """Remove and yield the records up to number ``until``."""
        while self._notes and self._notes[0][0] <= until:
            yield self._notes.popleft()[1]


class ParentArrivals(SignalHandlers):
    """The parent's handlers of the signals about arriving messages: received, rejected, unknown.

    A task's first arrival precedes all other events of the task, so the record of the first arrival
    goes directly to the ring. The record of a later arrival goes to :class:`OrderedNotes`, because
    the children's earlier messages must be handled first.
    """

    signals = ("task_received", "task_rejected", "task_unknown")
    withholds = True

    def __init__(
        self,
        put: Put,
        later: Put,
        encoder: TaskEncoder,
        task_types: TaskTypes,
        *,
        worker: str,
        args: bool,
        queue_of: Callable[[object], str | None],
        kept_runs: KeptRuns | None,
        on_loss: Callable[[], object],
    ) -> None:
        #: Ids of the tasks whose last end a handler of the parent reported, oldest first.
        self.parent_ends: dict[str, None] = {}
        super().__init__(
            _put_in_order(put, later, encoder.received, self.parent_ends),
            encoder,
            task_types,
            worker=worker,
            args=args,
            queue_of=queue_of,
            kept_runs=kept_runs,
            on_loss=on_loss,
        )


def _put_in_order(
    put: Put,
    later: Put,
    received: Callable[[Captured], bytes],
    parent_ends: dict[str, None],
) -> Put:
    def put_in_order(record: Captured) -> None:
        if record[0] != received:
            put(record)
        elif record[3].arrived or record[3].attempt is not None:
            later(record)
        else:
            record[3].arrived = True
            if parent_ends:
                parent_ends.pop(record[2], None)
            put(record)

    return put_in_order


class ParentEnds(NoteHandlers):
    """The parent's handlers for the ends of runs that no child can report."""

    signals = ("task_failure", "task_retry", "task_revoked")


@dataclass(slots=True)
class Run:
    """A run that a child has started and not ended.

    ``retries`` is the number of the task's retries before the run. ``vanished_at`` is the monotonic
    time at which the parent first missed the child, in seconds; 0 while the child lives.
    """

    pid: int
    task_state: TaskState
    retries: int
    vanished_at: float = 0.0


class PreforkCapture:
    """Captures the events of a prefork worker in the parent process.

    :param put: ``Ring.put``.
    :param runs: ``Ring.runs``, which stores the open runs of all children; if ``None``, they are
        not stored.
    :param counts: ``Ring.counts``.
    """

    name = "z4j-celery-channel"

    def __init__(
        self,
        adapter: CeleryEngineAdapter,
        put: Put,
        consumer: Consumer,
        backend: BaseConcurrency,
        *,
        args: bool = True,
        result: bool = True,
        runs: IOpenRuns | None = None,
        on_loss: Callable[[], object] = int,
        counts: TaskCounts | None = None,
    ) -> None:
        from z4j_celery.meta import get_meta

        worker = safe_name(consumer.hostname, adapter.redaction.value_matches)
        self._late = prefork.channel is None or prefork.missed
        self._channel = prefork.open()
        self._notes = OrderedNotes(self._channel.writer())
        encoder = TaskEncoder(adapter.name, Redactor(adapter.redaction), worker, counts)
        task_types = TaskTypes(get_meta)
        kept = (
            None
            if runs is None
            else KeptRuns(runs, put, encoder, adapter.celery_app, adapter.name, worker)
        )
        self.arrivals = arrivals = ParentArrivals(
            put,
            self._notes.put,
            encoder,
            task_types,
            worker=worker,
            args=args,
            queue_of=QueueNames(consumer).of,
            kept_runs=kept,
            on_loss=on_loss,
        )
        self._handlers = (arrivals, ParentEnds(self._notes.put, on_loss))
        self._runs = Runs(
            put if kept is None else kept.put,
            encoder,
            task_types,
            arrivals,
            adapter,
            consumer,
            backend.call_blocking,
            result=result,
        )
        self._backend = backend
        #: Number of messages from the children that could not be decoded or handled.
        self.unreadable = 0
        self._finished = backend.event()
        self._finished.set()

    def connect(self) -> None:
        """Connect the handlers, and let the children send their records."""
        if self._late:
            logger.warning(
                "z4j: the agent was installed when the prefork worker was already running."
                " Earlier runs are not reported, and children that started before the import of"
                " z4j_celery report nothing. Import z4j_celery, or install the agent, in the module"
                " of the Celery application"
            )
            self._late = prefork.missed = False
        self._channel.counters.agent = PRESENT
        for handlers in self._handlers:
            handlers.connect()
        prefork.handlers[:] = self._handlers

    def finish(self) -> None:
        """Wait at most :data:`FINISH_TIMEOUT` seconds until :meth:`run` has read all messages."""
        self._backend.wait(self._finished, FINISH_TIMEOUT)

    def disconnect(self) -> None:
        """Disconnect the handlers, and let the children send no more records."""
        self._channel.counters.agent = ABSENT
        for handlers in self._handlers:
            handlers.disconnect()
        prefork.handlers.clear()

    def lost(self) -> int:
        """Return the number of messages that did not fit into the channel."""
        return self._channel.lost()

    def run(self, stop_event: IEvent) -> None:
        """Read messages until ``stop_event`` is set. Then read the messages that were already sent.

        While messages arrive, the loop reads at short intervals, and the children keep starts.
        At other times the loop waits for the next message, and the children send starts at once.
        """
        self._finished.clear()
        backend, counters, reader = self._backend, self._channel.counters, self._channel.reader
        timeout = BUSY_WAIT
        try:
            while not stop_event.is_set():
                active = self.drain()
                if not active and counters.polling:
                    counters.polling = 0
                    active = self.drain()
                    timeout = BUSY_WAIT
                if active:
                    counters.polling = 1
                    backend.wait(stop_event, GATHER_SECONDS)
                else:
                    backend.wait_readable(reader, timeout)
                    timeout = BUSY_WAIT if self._runs.open else IDLE_WAIT
                for pid in self._runs.check(backend.now()):
                    reader.forget(pid)
            counters.polling = 0
            self.drain()
            self.drain()
        finally:
            if not backend.forked():
                counters.polling = 0
                self._finished.set()

    def drain(self) -> bool:
        """Handle the messages in the channel and the records of the parent's handlers.

        A kept start is handled at the second call that finds it. Before that, most runs end and
        send their starts.

        Return whether a message was handled, or a child keeps a start.
        """
        until, checkpoint = self._notes.last(), TimeSlice(self._backend).checkpoint
        own, reader = self._channel.pid, self._channel.reader
        active = until > 0
        while True:
            for pid, message in reader.read():
                active = True
                if pid == own:
                    self._take(_MARK.unpack(message)[0])
                else:
                    self._read(pid, message)
                checkpoint()
            if reader.empty:
                break
        self._take(until)
        for pid, message in reader.kept_starts():
            active = True
            self._read(pid, message)
        return active or reader.keeping

    def _read(self, pid: int, message: bytes) -> None:
        try:
            self._runs.on_note(pid, decode_note(message))
        except Exception as error:
            self.unreadable += 1
            logger.debug("z4j: unreadable note of a child: %s", type(error).__name__)

    def _take(self, until: int) -> None:
        for record in self._notes.take(until):
            for pid, message in self._channel.reader.search_kept(partial(_precedes, record)):
                self._read(pid, message)
            self._runs.on_own(record)


def _precedes(record: Captured, message: bytes) -> bool:
    """Whether a child started a run of the record's task before the record was made."""
    try:
        _, started, task_id, *_ = decode_note(message)
    except Exception:
        return False
    return bool(task_id == record[2] and started <= record[1])


class Runs:
    """Turns the children's notes into records for the ring, and stores the open runs."""

    def __init__(
        self,
        put: Put,
        encoder: TaskEncoder,
        task_types: TaskTypes,
        arrivals: ParentArrivals,
        adapter: CeleryEngineAdapter,
        consumer: Consumer,
        call_blocking: Callable[..., Any],
        *,
        result: bool,
    ) -> None:
        #: The open runs by task id.
        self.open: dict[str, Run] = {}
        self._put = put
        self._encoder = encoder
        self._task_types = task_types
        self._task_states = arrivals.task_states
        self._repeated_runs = arrivals.repeated_runs
        self._app = adapter.celery_app
        self._pool = consumer.pool
        self._result = result
        self._call_blocking = call_blocking
        self._parent_ends = arrivals.parent_ends

    def on_note(self, pid: int, note: Note) -> None:
        """Record the event of a child's note, and open or close the run."""
        code, now, task_id, name, started_at, key, *rest = note
        last = self._task_state(task_id, name)
        if last is None:
            return
        request = _FIRST if key is None else {"retries": key[0], "replaced_task_nesting": key[1]}
        if code == Codes.started:
            self._started(pid, now, task_id, last, started_at, request)
            return
        self._close(task_id, last, request)
        if code == Codes.succeeded:
            ended, _, result = rest
            task_state = self._repeated_runs.ended(task_id, last, request)
            result = result if self._result else None
            head = self._encoder.succeeded
            self._put((head, now, task_id, task_state, ended, self._result, result))
        elif code == Codes.requeued:
            self._repeated_runs.requeued(task_id, last, request, rest[0])
        else:
            self._generic(now, task_id, last, request, *rest)

    def _started(
        self,
        pid: int,
        now: float,
        task_id: str,
        last: TaskState,
        started_at: float,
        request: Request,
    ) -> None:
        key, task_state = run_key(request), last
        if last.attempt is not None:
            task_state = self._task_states.of_run(last, key)
        previous = self.open.get(task_id)
        if previous is not None and previous.pid != pid and previous.task_state is task_state:
            if key[0] <= previous.retries:
                self._superseded(task_id, previous, now)
            elif task_state is last:
                # The open run was retried, and the note of the retry has not been read yet.
                # When this run was received, the start of the open run had not been read either.
                new = TaskState(last.task_type, last.queue)
                task_state = last = self._task_states.supersede(task_id, last, new, key, now)
        record = (self._encoder.started, now, task_id, last)
        if last.attempt is None:
            self._put(record)
        else:
            self._repeated_runs.started(record, request)
        task_state.started_at = started_at
        self.open[task_id] = Run(pid, task_state, key[0])

    def _close(self, task_id: str, last: TaskState, request: Request) -> None:
        """Forget a task's open run, unless that run is later than the run of ``request``.

        After ``retry(countdown=0)`` another child may already run the task again.
        """
        run = self.open.get(task_id)
        if run is not None and (
            last.attempt is None
            or run.task_state is self._task_states.of_run(last, run_key(request))
        ):
            del self.open[task_id]

    def on_own(self, record: Captured) -> None:
        """Record an event of the parent's own handlers, and close the run that it ends."""
        if record[0] != Codes.generic:  # the task was received again
            self._parent_ends.pop(record[2], None)
            attempt = record[3].attempt
            # After a run has returned its message to the queue, the arrival is not reported again.
            if attempt is None or not attempt.requeued_at:
                self._put(record)
            return
        _, now, task_id, named, kind, own, ended = record
        known = self._task_states.get(task_id)
        # At a hard time limit Celery sends task_failure twice.
        # The first signal removes the task's state, so the second one is ignored.
        if known is None and (kind != REVOKED or task_id in self._parent_ends):
            return
        task_state = known or self._task_state(task_id, named.task_type.name)
        if task_state is None:
            return
        self.open.pop(task_id, None)
        if ended is not None:
            while len(self._parent_ends) >= MAX_PARENT_ENDS:
                del self._parent_ends[next(iter(self._parent_ends))]
            self._parent_ends[task_id] = None
        self._generic(now, task_id, task_state, _FIRST, kind, own, ended)

    def check(self, now: float) -> list[int]:
        """Report the ends of runs whose child has disappeared; return the pids of these children.

        :param now: the monotonic time in seconds.
        """
        if not self.open:
            return []
        pids = self._pids()
        if pids is None:
            return []
        gone = []
        for task_id, run in list(self.open.items()):
            if run.pid in pids:
                continue
            if not run.vanished_at:
                run.vanished_at = now
            elif now - run.vanished_at > self._vanished_delay():
                gone.append(run.pid)
                del self.open[task_id]
                self._vanished(task_id, run)
        return gone

    def _task_state(self, task_id: str, name: str) -> TaskState | None:
        """Return a task's state.

        ``None`` if the task is not sampled, or if a handler of the parent has reported the task's
        end.
        """
        task_state = self._task_states.get(task_id)
        if task_state is not None:
            return task_state
        task_type = self._task_types.of(self._app.tasks.get(name, name))
        if task_id in self._parent_ends or not task_type.is_sampled(task_id):
            return None
        return self._task_states.add(task_id, TaskState(task_type, None))

    def _generic(
        self,
        now: float,
        task_id: str,
        last: TaskState,
        request: Request,
        kind: str,
        own: dict[str, object],
        ended: float | None,
    ) -> None:
        if ended is not None:
            task_state = self._repeated_runs.ended(task_id, last, request)
        else:
            task_state = self._repeated_runs.ended(task_id, last, request, keep=True)
        if kind != REPLACED:
            self._put((self._encoder.generic, now, task_id, task_state, kind, own, ended))
        if ended is None:
            task_state.started_at = 0.0
        self._repeated_runs.retried(task_id, task_state)

    def _superseded(self, task_id: str, run: Run, now: float) -> None:
        """Report a retry if the run's child has disappeared and another child reruns the task."""
        pids = self._pids()
        if pids is not None and run.pid not in pids:
            own = {"reason": _RETURNED, "retry_count": 0}
            head = self._encoder.generic
            self._put((head, now - 0.001, task_id, run.task_state, RETRIED, own, None))

    def _vanished(self, task_id: str, run: Run) -> None:
        """Report a run's end if its child has disappeared and Celery has not reported the end."""
        task = self._app.tasks.get(run.task_state.task_type.name)
        state, value, traceback = self._stored(task_id, task)
        own: dict[str, object]
        if state == "SUCCESS":
            kind, own = SUCCEEDED, {"result": snapshot(value)} if self._result else {}
        elif state == "FAILURE":
            kind, own = FAILED, failure_fields(value, traceback)
        elif getattr(task, "acks_late", False) and getattr(task, "reject_on_worker_lost", False):
            kind, own = RETRIED, {"reason": _RETURNED, "retry_count": 0}
        else:
            kind = FAILED
            own = {"exception": "WorkerLostError", "exception_message": _VANISHED}
        self._put((self._encoder.generic, time(), task_id, run.task_state, kind, own, None))
        run.task_state.started_at = 0.0
        if kind != RETRIED:
            self._task_states.end(task_id, run.task_state)

    def _stored(self, task_id: str, task: Task | None) -> tuple[str, object, object]:
        """Return a task's state, result and traceback from the result backend.

        The state is empty if the backend has no result or fails.
        """
        try:
            if task is None or task.ignore_result or task.backend.as_uri() == "rpc://":
                return "", None, None
            meta = self._call_blocking(task.backend.get_task_meta, task_id, cache=False)
            return str(meta["status"]), meta["result"], meta.get("traceback")
        except Exception as error:
            logger.debug("z4j: no result of a task whose child is gone: %s", type(error).__name__)
            return "", None, None

    def _pids(self) -> set[int] | None:
        """Return the pids of the pool's children; ``None`` while there is no pool."""
        try:
            return {process.pid for process in self._pool._pool._pool}  # noqa: SLF001
        except (AttributeError, TypeError):
            return None

    def _vanished_delay(self) -> float:
        waits = hasattr(self._pool._pool, "_fileno_to_outq")  # noqa: SLF001
        return VANISHED_DELAY if waits else VANISHED_DELAY_BLOCKING
