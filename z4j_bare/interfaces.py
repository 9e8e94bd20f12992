"""The interfaces between the subpackages of z4j_bare.

The docstrings are the specification. Times are in seconds, sizes are in bytes, and payloads are
canonical JSON in UTF-8. mypy-zope and ``tests/unit/test_contracts.py`` check the implementations.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, TypeVarTuple

from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from selectors import BaseSelector
    from types import FrameType, ModuleType

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class HasFileno(Protocol):
    """A socket or file with a descriptor."""

    def fileno(self) -> int:
        """Return the file descriptor."""
        ...


class ITask(Interface):
    """A running greenlet or thread of the agent."""

    name: str = Attribute("The name that was given to ``spawn``.")

    def alive() -> bool:
        """Return whether the task is still running."""

    def stuck(seconds: float) -> bool:
        """Return whether the current step of the task takes longer than ``seconds``.

        A step ends when the task waits through the backend. A task is stuck if it computes for too
        long, or waits in another way.
        """

    def join(timeout: float | None = None) -> bool:
        """Wait for the end of the task; return ``False`` if ``timeout`` seconds pass first."""


class IEvent(Interface):
    """A flag that tasks can wait for, such as ``threading.Event``.

    ``set`` never switches greenlets and never blocks.
    """

    def set() -> None:
        """Set the flag and wake all waiters."""

    def clear() -> None:
        """Clear the flag."""

    def is_set() -> bool:
        """Return whether the flag is set."""

    def wait(timeout: float | None = None) -> bool:
        """Wait for the flag and return ``True``, or ``False`` after ``timeout`` seconds.

        Tasks of the agent call ``IConcurrency.wait`` instead, because that method checks for forks
        and ends the step.
        """


class ILock(Interface):
    """A lock as a context manager. A task that waits for the lock yields to the hub."""

    def __enter__() -> object:
        """Acquire the lock."""

    def __exit__(exc_type: object, exc: object, traceback: object) -> object:
        """Release the lock."""


class IConcurrency(Interface):
    """The backend, the only code that uses primitives of threads, gevent or eventlet.

    A *step* is the work of a task between two waits. The backend measures each step, because a long
    step blocks the hub. In a forked child of the process that created the backend, every method
    that waits raises ``ForkedChildError`` when it starts or wakes up.
    """

    name: str = Attribute("'threads', 'gevent', 'eventlet' or 'fake'.")

    def now() -> float:
        """Return the monotonic time, for intervals and deadlines."""

    def wall() -> float:
        """Return the time since the epoch, for timestamps."""

    def forked() -> bool:
        """Return whether this process was forked from the process that created the backend."""

    def spawn(function: Callable[[*Ts], object], *args: *Ts, name: str) -> ITask:
        """Run ``function(*args)`` in a new daemon task.

        The task does not keep the process alive. An exception of ``function`` is logged as a bug.
        Raises ``InterpreterShutdownError`` during the shutdown of the interpreter.
        """

    def sleep(seconds: float) -> None:
        """Wait for ``seconds`` while other tasks run; ``0`` yields once."""

    def wait(event: IEvent, timeout: float | None = None) -> bool:
        """Wait for ``event`` and return ``True``, or ``False`` after ``timeout`` seconds."""

    def call_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call foreign code that waits without the backend, such as a library on patched sockets.

        The call is not measured as a step.
        """

    def event() -> IEvent:
        """Return a new event of this backend."""

    def lock() -> ILock:
        """Return a new lock of this backend."""

    def offload(function: Callable[[*Ts], object], *args: *Ts) -> tuple[bool, Any]:
        """Run ``function(*args)`` on the native thread, where it cannot block the hub.

        Returns ``(True, result)`` or ``(False, exception)``. Only one call runs at a time. The
        function must neither log nor use a patched lock or socket. A patched lock that a native
        thread holds would deadlock the hub (ddtrace #19538).
        """

    def wait_readable(sock: HasFileno, timeout: float) -> bool:
        """Return whether ``sock`` becomes readable within ``timeout`` seconds."""

    def wait_writable(sock: HasFileno, timeout: float) -> bool:
        """Return whether ``sock`` becomes writable within ``timeout`` seconds."""

    def selector() -> BaseSelector:
        """Return a new selector that yields to the hub while it waits."""

    def import_module(module: str) -> ModuleType:
        """Import and return a large module. Under gevent the import yields between files."""

    def native_ident() -> int:
        """Return the current OS thread's key in ``sys._current_frames``, or 0 without a hub."""

    def context_getter() -> Callable[[], object]:
        """Return the function that returns the current greenlet, or the thread's ident."""

    def frame_reader() -> Callable[[object], FrameType | None]:
        """Return a function that returns the innermost frame of a context at this moment.

        A context is a result of :meth:`context_getter`. The function returns ``None`` if the
        context has ended or, with a hub, is running now.
        """

    def start_native_thread(function: Callable[..., object], *args: object) -> bool:
        """If there is a hub, run ``function(sleep, *args)`` in an unpatched daemon thread.

        Returns whether there is a hub. ``sleep`` is the unpatched ``time.sleep``. The function must
        not log, take a lock or use objects of the hub.
        """

    def timer(
        seconds: float, function: Callable[[], object], *, once: bool = False
    ) -> Callable[[], object] | None:
        """If there is a hub, make it call ``function()`` every ``seconds`` seconds.

        Returns a function that cancels the timer, or ``None`` if there is no hub. A call takes a
        quarter of the time of a task's wake-up, and is not measured as a step. ``function`` must
        not wait, log, raise or compute for long.

        :param once: call ``function`` a single time.
        """

    def close() -> None:
        """Stop the native helper threads. All tasks must have ended."""


class IStore(Interface):
    """The durable queue between capture and the connection, and the ledger of commands.

    All methods except ``read_cached`` run inside ``IConcurrency.offload``. Therefore they do not
    log, wait for a task or switch greenlets. The methods raise only ``LocalStorageError``. Row ids
    strictly increase, and rows are read in the order of their ids.
    """

    durable: bool = Attribute("Whether rows survive the end of the process.")

    def append(rows: Sequence[tuple[str, str, bytes]]) -> int:
        """Commit ``(kind, key, payload)`` rows in one transaction.

        Returns the number of older rows that were evicted because of the caps. ``kind`` is
        ``event``, ``result`` or ``projection``. ``key`` is the frame id of a result, the engine's
        task id of an event, or empty.
        """

    def append_events(payloads: Sequence[bytes]) -> int:
        """Call :meth:`append` with event rows whose keys are empty."""

    def drain(after: int, limit: int, max_bytes: int, kinds: Sequence[str]) -> Any:
        """Return the oldest ``BufferEntry`` rows of these kinds with ``id > after``.

        Returns at most ``limit`` rows with at most ``max_bytes`` of payloads. A first row that is
        larger than ``max_bytes`` is returned alone. No row is deleted.
        """

    def read_cached(after: int, limit: int, max_bytes: int, kinds: Sequence[str]) -> Any:
        """Return the result of :meth:`drain` if it is known without I/O, else ``None``.

        May be called outside ``offload``, but not during a call of another method.
        """

    def confirm(ids: Sequence[int]) -> int:
        """Delete acknowledged rows; return the number of rows that existed."""

    def discard(ids: Sequence[int], reason: str) -> int:
        """Delete undeliverable rows; return the number of rows that existed.

        The same transaction counts the rows as lost under ``reason``.
        """

    def increment_attempts(ids: Sequence[int]) -> None:
        """Add 1 to ``attempts`` of rows that were in flight when the brain ended a session."""

    def stats() -> Any:
        """Return the current ``BufferStats``."""

    def cached_stats() -> Any:
        """Return ``BufferStats`` without I/O, for use after a failure of the disk. Never raises."""

    def import_rows(rows: Sequence[Any]) -> int:
        """Commit ``BufferEntry`` rows of another store.

        The rows get new ids and keep their age and attempts.
        """

    def export_state() -> Any:
        """Return a ``StoreState``: losses, and the commands that the brain may deliver again."""

    def import_state(state: Any) -> None:
        """Add another store's ``StoreState`` to this store.

        The other store's losses count in this store as produced and as lost rows.
        """

    def claim(key: str, now: float, provisional_result: bytes = b"") -> Any:
        """Record command ``key`` as started and return ``None``.

        If the command was recorded before, return its ``LedgerEntry`` and change nothing. An effect
        that was recorded as ``failed`` is recorded as started again.

        :param provisional_result: the payload of the result to send if this process dies before the
            command has finished.
        """

    def settle(key: str, result: bytes, now: float, state: str = "done") -> None:
        """Record command ``key`` as done, and keep its result in case the command is redelivered.

        :param state: ``failed`` if a later claim may start the effect again.
        """

    def settle_and_queue(key: str, result: bytes, now: float) -> None:
        """Call :meth:`settle` and append the result as a row, in one transaction."""

    def close() -> None:
        """Close the file; delete it if it has neither rows nor recent commands. Idempotent."""


#: States of a run in :class:`IOpenRuns`. A run in the state ``RUN_ENDED`` is not reported.
RUN_ENDED, RUN_OPEN, RUN_SUCCEEDED, RUN_FAILED, RUN_RETRIED, RUN_REVOKED = range(6)
#: Flag of a run whose message the broker delivers again if the process dies.
RUN_REDELIVERED = 1


class IOpenRuns(Interface):
    """Keeps the open runs (executions of tasks) in memory that survives ``SIGKILL``.

    Another agent reports the runs whose process died. :meth:`start` and :meth:`end` run in the
    host's tasks, so they neither wait nor raise.
    """

    not_kept: int = Attribute("Number of runs that could not be kept; never decreases.")

    def enable() -> None:
        """Prepare to keep runs, without I/O."""

    def describe(engine: str, data: Mapping[str, object]) -> int:
        """Store the fields shared by all events of some runs; return the description's number."""

    def start(description: int, task_id: str, at: float, flags: int) -> int:
        """Keep a run that starts at ``at``; return a slot, or 0 if the run cannot be kept.

        ``flags`` is ``RUN_REDELIVERED`` or 0.
        """

    def end(slot: int, outcome: int, at: float, note: str = "") -> None:
        """Keep a run's end until the event that reports the end is stored.

        This event must already be in the ring. ``note`` is the class of a failed run's exception.
        """

    def acknowledged(slot: int) -> None:
        """Record that the broker does not deliver the message of an open run again."""

    def stored(number: int, at: float) -> None:
        """Drop the ends that events up to ``number`` report; their flush began at ``at``."""

    def close() -> None:
        """Delete the kept runs if no run is open and every end is stored."""


class ITransport(Interface):
    """Carries messages between agent and brain. Each transport object serves one session."""

    name: str = Attribute("'ws' or 'longpoll'.")

    synchronous_acks: bool = Attribute(
        "Whether ``send`` returns only after the brain has processed the frame. "
        "No ``event_batch_ack`` follows then."
    )

    def connect(hello: bytes) -> bytes:
        """Open the connection, send ``hello`` and return the brain's ``hello_ack`` message.

        Raises ``NetworkError`` when the connection fails, and ``RemoteError`` when the brain
        refuses the session.
        """

    def send(build: Callable[[], bytes]) -> int:
        """Build and write one frame; return its size.

        One lock is held while the frame is built and written, so that frames are written in the
        order of their sequence numbers.

        Raises ``NetworkError`` when the connection fails, ``RemoteError`` when the response reports
        an error, and ``FrameTooLargeError`` when the frame exceeds the size limit. The session
        continues after a ``FrameTooLargeError``.
        """

    def receive(timeout: float) -> bytes | None:
        """Return the next message, or ``None`` after ``timeout`` seconds without one.

        Only one task may receive. Raises ``NetworkError`` or ``RemoteError`` when the connection is
        closed.
        """

    def abort() -> None:
        """Break the connection and wake the receiving task.

        May be called by any task. Idempotent.
        """

    def close() -> None:
        """Send a close frame if that is possible without waiting, and close the connection.

        Only the owner of the connection may call this. Idempotent.
        """


class IConnection(Interface):
    """A live session with the brain, as the agent's loops use it."""

    closing: IEvent = Attribute("Set when the session ends. The loops of the session then return.")

    def send(kind: str, identity: str, payload: bytes) -> int:
        """Sign and send one frame of type ``kind`` with the id ``identity``; return its size.

        Raises ``NetworkError``, ``RemoteError`` or ``FrameTooLargeError`` as ``ITransport.send``
        does.
        """

    def send_shrinking(
        kind: str, identity: str, payload: bytes, shrink: Callable[[bytes], Iterator[bytes]]
    ) -> bool:
        """Send ``payload`` or its first smaller version that fits; return whether it was shrunk.

        ``shrink(payload)`` yields smaller and smaller versions. Raises ``FrameTooLargeError`` if
        even the smallest version does not fit.
        """


class IProcessRestart(Interface):
    """Restarts a worker by ending its process, for engines that cannot restart a worker."""

    is_supervised: bool = Attribute("Whether a supervisor would start this process again.")

    def request(worker: str) -> Any:
        """Return a ``CommandOutcome`` whose ``after_stored`` ends the process.

        Raises ``CommandError`` if this process is not ``worker``, has no supervisor, or started
        less than a minute ago.
        """


class ISchedulerHost(Interface):
    """One scheduler adapter: the source of schedules, and the target of schedule commands."""

    name: str = Attribute(
        "The scheduler's name, such as 'celery-beat'. "
        "The brain records it as the owner of the schedules."
    )
    redactor: Any = Attribute("Redacts a schedule by the rules that the brain applies.")
    result_redactor: Any = Attribute(
        "Redacts the result of a command, and keeps every value that ``redactor`` keeps."
    )

    def connect(changed: Callable[[], object]) -> None:
        """Make the adapter call ``changed`` when a schedule may have changed. Never raises.

        Any task or thread may call ``changed``.
        """

    def disconnect(timeout: float = 5.0) -> None:
        """Remove the registration of ``changed`` within ``timeout`` seconds. Never raises."""

    def capabilities() -> list[str]:
        """Return the capabilities that the scheduler has at this moment. Never raises."""

    def schedules(timeout: float) -> list[Any]:
        """Return all schedules of the scheduler.

        Raises an exception if it cannot return all schedules, because a missing schedule counts as
        deleted.
        """

    def schedule(identity: str, timeout: float) -> Any:
        """Return the schedule whose key in the scheduler is ``identity``, or ``None``."""

    def invoke(method_name: str, *args: object, timeout: float, **kwargs: object) -> Any:
        """Call a method of the adapter once and return its result.

        Raises ``CommandError`` when the adapter has no such method, ``TimeoutError`` after
        ``timeout`` seconds, and every exception of the method.
        """


class INativeSchedules(Interface):
    """An operator's changes to schedules that are defined in code.

    Equals ``NativeScheduleOverrides`` of ``z4j_core``. Adapters call both methods from worker
    threads and from the scheduler's loop.
    """

    def resolve(baseline: list[Any], *, owner: str) -> list[Any]:
        """Return ``baseline``, the schedules in code, with the operator's changes applied."""

    def mutate(
        *,
        owner: str,
        operation: str,
        schedule_id: str | None,
        expected: dict[str, Any] | None,
        definition: dict[str, Any],
        baseline: list[Any],
        validate: Callable[[Any], None],
        engine: str,
    ) -> Any:
        """Commit one change if the schedule still equals ``expected``.

        Returns the new schedule, or ``None`` after a deletion. Raises ``ValueError`` if the change
        is impossible, and every exception of ``validate``.
        """


class IBridge(Interface):
    """Runs the coroutines of adapters. Code of the host never finds a running event loop."""

    def call(
        function: Callable[..., object], *args: object, timeout: float, **kwargs: object
    ) -> Any:
        """Call an adapter's function, await an awaitable result, and return the result.

        After ``timeout`` seconds, cancels the coroutine and raises ``TimeoutError``. Raises every
        exception of the function.
        """

    def pump(
        iterate: Callable[[], AsyncIterator[Any]], sink: Callable[[Any], None], name: str
    ) -> Callable[[], None]:
        """Start a task that passes every item of ``iterate()`` to ``sink``.

        Returns a function that stops the task.
        """

    def loop() -> Any:
        """Return the object that adapters get as ``loop=``.

        The object's ``call_soon_threadsafe`` never raises and never switches greenlets.
        """

    def stop() -> None:
        """Cancel all calls and stop the loop.

        Idempotent. Later ``call_soon_threadsafe`` calls are dropped without an error.
        """
