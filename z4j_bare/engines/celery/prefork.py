"""Captures task events in a prefork worker's children, and sends the records to the parent.

A child may be forked before the settings and the redaction are known.
Therefore the child sends unredacted values, and the parent samples, redacts and encodes.
"""

from __future__ import annotations

import atexit
import logging
import marshal
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from sys import exc_info
from time import perf_counter
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency import fork
from z4j_bare.control import is_alive
from z4j_bare.engines.celery.channel import ABSENT, UNDECIDED, Channel, NamedChannel
from z4j_bare.engines.celery.outcomes import result_is_unstored, run_key
from z4j_bare.engines.celery.repeated_runs import RepeatedRuns
from z4j_bare.engines.celery.signals import SignalHandlers
from z4j_bare.engines.celery.task_state import RunKey, TaskState, TaskTypes
from z4j_bare.engines.celery.worker_start import CHANNEL_VARIABLE
from z4j_bare.events.ring import Captured, Put
from z4j_bare.events.snapshot import snapshot
from z4j_bare.home import ensure_home

if TYPE_CHECKING:
    from celery.app.task import Task

logger = logging.getLogger("z4j.runtime.engines.celery.prefork")

_PREFIX = "channel-"

#: Default of a parameter for which Celery always passes an argument.
_NO_TASK: Any = None

#: A child's message about one record: a number of :class:`Codes`, the time in seconds since the
#: epoch, the task id, the task name, the performance counter if the run starts (else 0), the run's
#: key (``None`` for the first run), and the other items of the record.
Note = tuple[Any, ...]


class Codes:
    """The first items of the records of :class:`NoteHandlers`, by kind.

    The kinds ``received`` and ``rejected`` are unused, because these handlers make no such records.
    """

    received = rejected = 0
    started = 1
    succeeded = 2
    generic = 3
    requeued = 4


#: The kind of a note about a run that ended because its task was replaced. No event reports it.
REPLACED = ""


class _NotedRuns(RepeatedRuns):
    """Keeps no states of runs, because the parent keeps them."""

    def ended(
        self, task_id: str, last: TaskState, request: object, *, keep: bool = False
    ) -> TaskState:
        del task_id, request, keep
        return last

    def requeued(self, task_id: str, last: TaskState, request: object, own: dict[str, Any]) -> None:
        del request
        self._put((Codes.requeued, self._clock(), task_id, last, own))


class NoteHandlers(SignalHandlers):
    """Handlers that use no task states and no ``@z4j_meta``. The parent adds both to each note."""

    def __init__(self, put: Put, on_loss: Callable[[], object] = int) -> None:
        super().__init__(put, Codes, TaskTypes(lambda _task: None), on_loss=on_loss)
        self.repeated_runs = _NotedRuns(
            self.task_states, put, Codes.generic, self._clock, withholds=False
        )

    def _task_state(self, task_id: str, task: Task) -> TaskState | None:
        del task_id
        if fork.epoch() != self._epoch:
            return None
        return TaskState(self._task_types.of(task), None)


class ChildCapture(NoteHandlers):
    """The signal handlers of a child."""

    signals = (
        "before_task_publish",
        "task_prerun",
        "task_postrun",
        "task_failure",
        "task_internal_error",
        "task_retry",
    )

    def __init__(self, channel: Channel | NamedChannel) -> None:
        self._writer = channel.writer()
        super().__init__(self._send, self._writer.count_lost)
        #: The key of the run of the current signal; ``None`` for a task's first run.
        self._key: RunKey | None = None
        #: Id and key of the run that started last. Thus the end of the run need not read
        #: ``task.request``.
        self._last_run: tuple[str, RunKey | None] = ("", None)
        self._counters = channel.counters

    # The next two handlers run for every task. They make no record and no task state.

    def _on_prerun(self, task_id: str = "", task: Task = _NO_TASK, **_kwargs: object) -> None:
        try:
            if self._counters.agent != ABSENT and fork.epoch() == self._epoch:
                task_id, key = str(task_id), self._key_of(task)
                self._last_run = task_id, key
                note = (Codes.started, self._clock(), task_id, task.name, perf_counter(), key)
                self._writer.send_start(encode_note(note))
        except Exception as error:
            if not self._suppresses("task_prerun", getattr(task, "name", None), error):
                raise

    def _on_postrun(
        self,
        task_id: str = "",
        task: Task = _NO_TASK,
        retval: object = None,
        state: str | None = None,
        **_kwargs: object,
    ) -> None:
        if state != "SUCCESS":
            # Without a state the child ends, and the parent reports the end of the run.
            if state is not None:
                super()._on_postrun(task_id, task, retval, state)
            return
        try:
            if (
                self._counters.agent != ABSENT
                and fork.epoch() == self._epoch
                and not (exc_info()[1] is not None and result_is_unstored())
            ):
                task_id, result, now = str(task_id), snapshot(retval), self._clock()
                started_id, key = self._last_run
                if started_id != task_id:
                    key = self._key_of(task)
                own = (perf_counter(), True, result)
                note = (Codes.succeeded, now, task_id, task.name, 0.0, key, *own)
                self._writer.send(encode_note(note))
        except Exception as error:
            if not self._suppresses("task_postrun", getattr(task, "name", None), error):
                raise

    @staticmethod
    def _key_of(task: Task) -> RunKey | None:
        request = task.request
        if not request.retries and not getattr(request, "replaced_task_nesting", 0):
            return None
        return run_key(request)

    def _task_state(self, task_id: str, task: Task) -> TaskState | None:
        if self._counters.agent == ABSENT:
            return None
        self._key = self._key_of(task)
        return super()._task_state(task_id, task)

    def _replaced(self, task_id: str, task_state: TaskState, task: Task) -> None:
        del task
        self._send((self._heads.generic, self._clock(), task_id, task_state, REPLACED, {}, None))

    def _send(self, record: Captured) -> None:
        code, now, task_id, task_state, *rest = record
        note = (code, now, task_id, task_state.task_type.name, 0.0, self._key, *rest)
        self._writer.send(encode_note(note))


def encode_note(note: Note) -> bytes:
    """Encode a note with ``marshal``, or with ``pickle`` if a text is of a subclass of ``str``."""
    try:
        return marshal.dumps(note)
    except ValueError:
        return pickle.dumps(note, protocol=pickle.HIGHEST_PROTOCOL)


def decode_note(message: bytes) -> Note:
    """Decode a message that :func:`encode_note` returned."""
    note: Note = pickle.loads(message) if message[:1] == b"\x80" else marshal.loads(message)  # noqa: S301, S302 - from the own children
    return note


class Prefork:
    """Holds a prefork worker's channel, and connects the handlers of the worker's children.

    Each process has one object, :data:`prefork`.

    :ivar channel: the channel, ``None`` before :meth:`open`.
    :ivar handlers: the parent's connected handlers, which a child disconnects.
    :ivar missed: whether the worker was ready before an agent was installed.
    """

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.handlers: list[SignalHandlers] = []
        self.missed = False
        self._child: ChildCapture | None = None

    def open(self, *, spawn: bool = False) -> Channel:
        """Return the channel, and make it at the first call.

        :param spawn: whether the children are new processes instead of forks.
        """
        from celery import signals

        if self.channel is None:
            self.channel = self._named() if spawn else Channel()
            signals.worker_process_init.connect(self._start_child, weak=False)
            # This handler is connected last, so Celery calls it after the handlers that install an
            # agent.
            signals.worker_ready.connect(self._decide, weak=False)
        return self.channel

    def attach(self, directory: str) -> None:
        """Start the capture in a spawned child when Celery has initialised the child.

        :param directory: path of the directory of the parent's channel.
        """
        from celery import signals

        def start_child(**_kwargs: object) -> None:
            try:
                self._child = ChildCapture(NamedChannel(Path(directory)))
            except OSError as error:
                logger.warning(
                    "z4j: this child cannot reach the agent in its parent (%s); its runs are not"
                    " reported",
                    error.strerror,
                )
                return
            self._child.connect()

        signals.worker_process_init.connect(start_child, weak=False)

    def _named(self) -> Channel:
        home = ensure_home()
        for left in home.glob(f"{_PREFIX}*"):
            if not is_alive(int(left.name.removeprefix(_PREFIX))):
                shutil.rmtree(left, ignore_errors=True)
        directory = home / f"{_PREFIX}{os.getpid()}"
        channel = Channel(directory)
        os.environ[CHANNEL_VARIABLE] = str(directory)
        atexit.register(channel.remove)
        return channel

    def close(self) -> None:
        """Close the channel. Only tests call this method."""
        from celery import signals

        if self.channel is not None:
            signals.worker_process_init.disconnect(self._start_child)
            signals.worker_ready.disconnect(self._decide)
            self.channel.close()
            self.channel = None
            os.environ.pop(CHANNEL_VARIABLE, None)

    def _start_child(self, **_kwargs: object) -> None:
        """In a new fork, disconnect the parent's handlers and connect the child's."""
        channel = self.channel
        if channel is None or channel.is_own():  # the solo pool also sends the signal
            return
        for handlers in self.handlers:
            handlers.disconnect()
        self.handlers.clear()
        self._child = ChildCapture(channel)
        self._child.connect()

    def _decide(self, **_kwargs: object) -> None:
        """Stop the children's messages if no agent is installed when the worker is ready."""
        channel = self.channel
        if channel is not None and channel.is_own() and channel.counters.agent == UNDECIDED:
            channel.counters.agent = ABSENT
            self.missed = True


#: The :class:`Prefork` of this process.
prefork = Prefork()
