"""Every contract between the rooms; the docstrings are the specification.

``tests/contract`` runs ``verifyObject`` over every implementer. Units are seconds and bytes throughout; payloads are
canonical JSON as UTF-8 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zope.interface import Attribute, Interface


class ITask(Interface):
    """A running greenlet or thread."""

    name: str = Attribute("The name it was spawned under.")

    def alive() -> bool:
        """Whether it has not ended yet."""

    def stuck(seconds: float) -> bool:
        """Whether it has computed, or waited for what the backend knows nothing of, for longer than that."""

    def join(timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds for its end; return whether it has ended."""


class IEvent(Interface):
    """A flag that tasks can wait for. ``set`` never switches greenlets and never blocks."""

    def set() -> None:
        """Raise the flag and wake every waiter."""

    def clear() -> None:
        """Lower the flag."""

    def is_set() -> bool:
        """Whether the flag is up."""

    def wait(timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds; return whether the flag is up."""


class ILock(Interface):
    """A lock that yields to the hub while it waits; a context manager."""

    def __enter__() -> Any:
        """Take it."""

    def __exit__(exc_type: Any, exc: Any, traceback: Any) -> Any:
        """Give it back."""


class IConcurrency(Interface):
    """The backend: the only place that knows which runtime carries the agent's loops.

    Every method that waits raises ``ForkedChildError`` when it wakes in a process other than the one that built the backend.
    """

    name: str = Attribute("'threads', 'gevent', 'eventlet' or 'fake'.")

    def now() -> float:
        """Monotonic seconds, for intervals."""

    def wall() -> float:
        """Seconds since the epoch, for time stamps."""

    def spawn(function: Callable[..., object], *args: object, name: str) -> Any:
        """Run ``function(*args)`` in a daemon task and return its :class:`ITask`.

        The task never keeps the process alive. An exception that escapes ``function`` is logged, once, on this side of
        the backend; it is a bug.
        """

    def sleep(seconds: float) -> None:
        """Let others run for ``seconds``; ``0`` yields once."""

    def event() -> Any:
        """Return a new :class:`IEvent`."""

    def lock() -> Any:
        """Return a new :class:`ILock`."""

    def offload(function: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
        """Run a pure ``function(*args)`` where it cannot stall the hub; ``(True, value)`` or ``(False, exception)``.

        At most one call at a time. The function must not log, nor touch any patched lock or socket: a patched lock held
        by a native thread wedges the hub (``field-notes`` C.5, ddtrace #19538).
        """

    def wait_readable(sock: Any, timeout: float) -> bool:
        """Wait until ``sock`` can be read; ``False`` after ``timeout`` seconds."""

    def wait_writable(sock: Any, timeout: float) -> bool:
        """Wait until ``sock`` can be written; ``False`` after ``timeout`` seconds."""

    def import_module(module: str) -> Any:
        """Import and return a module that is large for one step: where that is safe, the import yields between files."""

    def close() -> None:
        """Give native helpers back. Tasks must have ended."""


class IStore(Interface):
    """The durable queue between capture and the wire. Runs inside ``offload``: no logging, no waiting, no switching.

    Every method raises ``LocalStorageError`` and nothing else. ``id`` grows strictly; rows leave in that order.
    """

    durable: bool = Attribute("Whether rows survive the process.")

    def append(rows: Sequence[tuple[str, str, bytes]]) -> int:
        """Commit ``(kind, key, payload)`` rows in one transaction; return how many older rows the caps evicted.

        ``kind`` is ``event``, ``result`` or ``projection``; ``key`` is the frame id of a result, the engine task id of an
        event, or empty.
        """

    def append_events(payloads: Sequence[bytes]) -> int:
        """``append`` events with empty keys."""

    def drain(after: int, limit: int, max_bytes: int, kinds: Sequence[str]) -> Any:
        """Return the oldest ``BufferEntry`` rows with ``id > after`` of these kinds, at most ``limit`` of them.

        Their payloads add up to at most ``max_bytes``, except that a first row larger than that comes alone. Nothing is
        deleted.
        """

    def read_cached(after: int, limit: int, max_bytes: int, kinds: Sequence[str]) -> Any:
        """Return what ``drain`` does if that takes no I/O, else ``None``. Also outside ``offload``, between other calls."""

    def confirm(ids: Sequence[int]) -> int:
        """Delete delivered rows; return how many there were."""

    def discard(ids: Sequence[int], reason: str) -> int:
        """Delete undeliverable rows and count them under ``reason`` in the same transaction."""

    def increment_attempts(ids: Sequence[int]) -> None:
        """Note that these rows were on their way when the brain ended a session over a frame."""

    def stats() -> Any:
        """Return a ``BufferStats``: rows, bytes on disk, age of the oldest row, losses by reason."""

    def cached_stats() -> Any:
        """Return the same without asking the disk, which has failed; it never raises."""

    def import_rows(rows: Sequence[Any]) -> int:
        """Commit ``BufferEntry`` rows of another store: new ids, but the age and the attempts that they have."""

    def export_state() -> Any:
        """Return a ``StoreState``: the losses, and the commands that are young enough to be delivered again."""

    def import_state(export_state: Any) -> None:
        """Count another store's losses as produced and lost here, and learn of its commands."""

    def claim(key: str, now: float, provisional_result: bytes = b"") -> Any:
        """Enter command ``key`` in the ledger as started; return the earlier ``LedgerEntry`` if it was there already.

        ``provisional_result`` is the result payload that an heir sends if this process dies before the command is done.
        """

    def settle(key: str, result: bytes, now: float) -> None:
        """Mark command ``key`` done and keep its result payload for redeliveries."""

    def answer(key: str, result: bytes, now: float) -> None:
        """``settle`` and append the result as a row, both or neither."""

    def close() -> None:
        """Release the file; delete it when nothing in it is worth keeping. Idempotent."""


class ITransport(Interface):
    """Bytes to the brain and back. One session per object."""

    name: str = Attribute("'ws' or 'longpoll'.")

    confirms: bool = Attribute(
        "Whether a send that returned means that the brain is done with the frame; no ``event_batch_ack`` comes then."
    )

    def connect(hello: bytes) -> bytes:
        """Open the line, say ``hello``, return the brain's ``hello_ack`` message.

        Raises ``NetworkError``, or a ``RemoteError`` when the brain refused.
        """

    def send(build: Callable[[], bytes]) -> int:
        """Build one frame and write it under one lock, so that seq order is wire order; return its size in bytes.

        Raises ``NetworkError``; ``RemoteError`` where the answer comes with it; ``FrameTooLargeError``, after which the
        session stands and whatever was built has to be built smaller.
        """

    def receive(timeout: float) -> bytes | None:
        """Return the next message, or ``None`` when ``timeout`` seconds passed without one.

        Raises ``NetworkError`` or ``RemoteError`` when the line is gone. One reader at a time.
        """

    def abort() -> None:
        """Break the line from any task; wakes the reader. Idempotent."""

    def close() -> None:
        """Say goodbye if that takes no waiting, and release the line. For the owner only. Idempotent."""


class ISchedulerHost(Interface):
    """One scheduler adapter, for whoever tells its schedules and passes on what operators want of it."""

    name: str = Attribute(
        "The scheduler's name, such as 'celery-beat'; the brain calls it the owner of its schedules."
    )
    redactor: Any = Attribute("Hides in a schedule what the brain would hide.")
    answers: Any = Attribute(
        "Hides the same in the answer to a command, and leaves as it is what the first one has left."
    )

    def connect(changed: Callable[[], object]) -> None:
        """Have ``changed()`` called, in any task or thread, when a schedule may have changed; never raises."""

    def disconnect(timeout: float = 5.0) -> None:
        """Undo that within ``timeout`` seconds; never raises."""

    def capabilities() -> list[str]:
        """Return what the scheduler can do now; never raises."""

    def schedules(timeout: float) -> list[Any]:
        """Return all of its schedules, or raise: what is left out counts as deleted."""

    def schedule(identity: str, timeout: float) -> Any:
        """Return one schedule by the scheduler's own name of it, ``None`` when there is none."""

    def invoke(method_name: str, *args: Any, timeout: float, **kwargs: Any) -> Any:
        """Call a method of the adapter once and return its result.

        Raises ``CommandError`` when it has no such method, ``TimeoutError`` after ``timeout`` seconds, else what it raises.
        """


class INativeSchedules(Interface):
    """What an operator has changed of schedules that are defined in code; ``z4j_core``'s ``NativeScheduleOverrides``.

    Adapters call both methods from worker threads, and from the scheduler's own loop.
    """

    def resolve(baseline: list[Any], *, owner: str) -> list[Any]:
        """Return the schedules in force: those of the code, with what was changed, deleted and added."""

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
        """Commit one change if the schedule is still as ``expected``; return it as it is now, ``None`` when deleted.

        Raises ``ValueError`` for what cannot be done, and whatever ``validate`` raises.
        """


class IProcessRestart(Interface):
    """Restarts an engine's worker by ending its process, for engines that cannot restart one."""

    is_supervised: bool = Attribute("Whether a supervisor would start this process again.")

    def request(worker: str) -> Any:
        """Return a ``CommandOutcome`` whose ``after_stored`` ends the process.

        Raises ``CommandError`` where a restart would be wrong.
        """


class IBridge(Interface):
    """Runs the coroutines of asyncio-flavoured adapters without showing the host a running loop."""

    def call(function: Callable[..., Any], *args: Any, timeout: float, **kwargs: Any) -> Any:
        """Call an adapter's coroutine function and return its result.

        Raises ``TimeoutError`` after ``timeout`` seconds (the coroutine is cancelled) and whatever the adapter raises.
        """

    def pump(
        iterate: Callable[[], Any], sink: Callable[[Any], None], name: str
    ) -> Callable[[], None]:
        """Feed every item of an adapter's async generator to ``sink``; return a function that ends it."""

    def loop() -> Any:
        """Return the object that adapters get as ``loop=``; its ``call_soon_threadsafe`` never raises, never switches."""

    def stop() -> None:
        """Cancel what runs and end the loop. Idempotent; calls that arrive later are dropped in silence."""
