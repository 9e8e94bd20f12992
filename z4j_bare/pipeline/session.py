"""Runs sessions with the brain: connects, runs the session's loops, waits, connects again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from zope.interface import implementer

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.errors import (
    AgentError,
    FrameTooLargeError,
    InterpreterShutdownError,
    NetworkError,
    RemoteError,
    TurnedAwayError,
)
from z4j_bare.interfaces import IConnection, IEvent, ITransport
from z4j_bare.pipeline.clock import ClockCheck
from z4j_bare.pipeline.heartbeat import HeartbeatLoop
from z4j_bare.pipeline.receive import ReceiveLoop
from z4j_bare.pipeline.reconnect_log import ReconnectLog
from z4j_bare.wire import close_codes
from z4j_bare.wire.backoff import Backoff, ReconnectBackoff, failure_class
from z4j_bare.wire.session import Session, parse_hello_ack

if TYPE_CHECKING:
    from z4j_core.models import Config
    from z4j_core.transport.frames import CommandFrame, Frame

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.concurrency.base import Task
    from z4j_bare.monitoring.metrics import AgentMetrics, Counters
    from z4j_bare.pipeline.identity import AgentIdentity
    from z4j_bare.pipeline.send import Sender
    from z4j_bare.settings import Settings

logger = logging.getLogger("z4j.runtime.pipeline.session")

#: Maximum drift between two synchronised clocks, in seconds per second.
CLOCK_DRIFT = 1e-4

#: Seconds that :meth:`SessionLoops.run` waits for each of its loops after the session has ended.
SESSION_JOIN_TIMEOUT = 5.0

#: Seconds until a failed loop is restarted. Each further failure doubles the delay.
RESTART_DELAY = 1.0

#: Maximum of the restart delay in seconds.
#: If a loop ran for longer than this, the next delay is ``RESTART_DELAY`` again.
RESTART_DELAY_MAX = 60.0


@implementer(IConnection)
class Connection:
    """One accepted connection, which sends signed frames and verifies received frames.

    Any loop may send. The transport's lock ensures that frames are written in the order of their
    sequence numbers.

    :param transport: a connected transport.
    """

    def __init__(self, transport: ITransport, session: Session, backend: BaseConcurrency) -> None:
        self.transport = transport
        self.session = session
        self.hello_ack = session.hello_ack
        #: Start of the session in seconds since the epoch.
        self.connected_at = backend.wall()
        #: Number of consecutive failures before this session by class; emptied when
        #: ``agent_status`` has reported the numbers.
        self.failures_before: dict[str, int] = {}
        #: Called at the first ack; over long-poll, at the first upload.
        self.on_accepted: Callable[[], object] | None = None
        #: Set when a heartbeat is due at once, and when the session ends.
        self.beat = backend.event()
        #: Set when the session ends.
        self.closing = backend.event()
        #: Set when the store may contain rows to send, and when the session ends.
        self.wake = backend.event()
        self._backend = backend
        self._connected_at = backend.now()
        self._timeslice = TimeSlice(backend)
        self._fastest = float("inf")
        self._received_at = backend.now()
        if self.hello_ack.server_time is not None:
            self.relative_delay(self.hello_ack.server_time)

    @property
    def clock_offset(self) -> float | None:
        """The brain's clock minus this host's clock, in seconds.

        ``None`` if ``hello_ack`` has no time. The value follows changes of this host's clock after
        ``hello_ack``, but not changes of the brain's clock.
        """
        if self.hello_ack.server_time is None:
            return None
        backend = self._backend
        elapsed = backend.now() - self._connected_at
        return self.hello_ack.server_time + elapsed - backend.wall()

    def accept(self) -> None:
        """Record that the brain has accepted a frame of this session."""
        if self.on_accepted is not None:
            accepted, self.on_accepted = self.on_accepted, None
            accepted()

    def send(self, kind: str, identity: str, payload: bytes) -> int:
        """Sign and send one frame; return its size in bytes. Raises ``NetworkError``."""
        size: int = self.transport.send(
            lambda: self.session.sign(kind, identity, payload, self._backend.wall())
        )
        if self.on_accepted is not None and self.transport.synchronous_acks:
            self.accept()
        return size

    def send_shrinking(
        self, kind: str, identity: str, payload: bytes, shrink: Callable[[bytes], Iterator[bytes]]
    ) -> bool:
        """Send the payload, or the first smaller version of the payload that fits in a frame.

        :param shrink: yields versions of a payload in order of decreasing size.
        :return: whether a smaller version was sent.
        :raises FrameTooLargeError: no version fits.
        """
        try:
            self.send(kind, identity, payload)
            return False
        except FrameTooLargeError as error:
            too_large = error
        for version in shrink(payload):
            try:
                self.send(kind, identity, version)
                return True
            except FrameTooLargeError as error:
                too_large = error
        raise too_large

    def open(self, message: bytes) -> Frame:
        """Verify a message and return it as a model of z4j_core. Raises ``RemoteProtocolError``."""
        # Yield here, because the receive loop does not wait between the messages of one read, which
        # can be fifty commands.
        self._timeslice.checkpoint()
        frame: Frame = self.session.verify(message, self._timeslice.checkpoint)
        return frame

    def on_receive_waited(self) -> None:
        """Start a new time slice, because other tasks have run while the receive loop waited."""
        self._timeslice.restart()

    def relative_delay(self, sent_at: float) -> float:
        """Return by how many seconds a frame was slower than the fastest frame of this session.

        A frame is read late if the worker was stopped or the hub was blocked. A delay is known only
        relative to other frames, because the clocks of the brain and of this host may differ. The
        time of the fastest frame grows by ``CLOCK_DRIFT``, so that a drift of the clocks does not
        count as delay.

        :param sent_at: the brain's timestamp of the frame, in seconds since the epoch.
        """
        now = self._backend.now()
        took = now - sent_at
        self._fastest = min(took, self._fastest + (now - self._received_at) * CLOCK_DRIFT)
        self._received_at = now
        return took - self._fastest

    def close(self) -> None:
        """End the session. The receive loop ends at once, and other loops at their next wake-up."""
        self.closing.set()
        self.beat.set()
        self.wake.set()
        self.transport.abort()


class FallbackMonitor(Protocol):
    """Ends a long-poll session as soon as WebSocket works again."""

    def needs_recovery(self, connection: Connection) -> bool:
        """Return whether :meth:`monitor_recovery` has to run during this session."""

    def monitor_recovery(self, connection: Connection) -> None:
        """Wait until the session has ended or WebSocket works again."""


class SessionLoops:
    """Runs the loops of a connection: sender, heartbeat, receiver and fallback monitor.

    The heartbeat interval is ``Z4J_HEARTBEAT_SECONDS``, or the brain's interval if that is shorter.

    :param submit: accepts a command frame, its connection and its delay in seconds; must not wait.
    """

    def __init__(
        self,
        sender: Sender,
        submit: Callable[[CommandFrame, Connection, float], None],
        metrics: AgentMetrics,
        identity: AgentIdentity,
        fallback: FallbackMonitor,
        config: Config,
        settings: Settings,
        backend: BaseConcurrency,
        counters: Counters,
    ) -> None:
        #: Functions to call at the start of each session.
        self.on_start: list[Callable[[], object]] = []
        #: Functions to call at the end of each session.
        self.on_end: list[Callable[[], object]] = []
        self.sender = sender
        self._tasks: list[Task] = []
        self._submit = submit
        self._metrics = metrics
        self._identity = identity
        self._fallback = fallback
        self._backend = backend
        self._counters = counters
        self._heartbeat_seconds = float(config.heartbeat_seconds)
        self._settings = settings

    def run(self, connection: Connection) -> None:
        """Run the loops until the session ends.

        Raises an ``AgentError`` unless the agent ended the session.
        """
        for start in self.on_start:
            start()
        errors: list[AgentError] = []
        loops: list[tuple[Callable[[], None], str]] = [
            (partial(self.sender.run, connection), "z4j-send"),
            (self._heartbeat(connection).run, "z4j-heartbeat"),
        ]
        if self._fallback.needs_recovery(connection):
            loops.append((partial(self._fallback.monitor_recovery, connection), "z4j-fallback"))
        self._tasks = [
            self._backend.spawn(self._run_loop, connection, run, name, errors, name=name)
            for run, name in loops
        ]
        try:
            ReceiveLoop(connection, self.sender.on_ack, self._submit).run()
        except AgentError as error:
            # If ``closing`` is set and no loop has failed, the agent itself ended the session.
            if errors or not connection.closing.is_set():
                errors.append(error)
        finally:
            connection.close()
            for end in self.on_end:
                end()
            for task in self._tasks:
                task.join(SESSION_JOIN_TIMEOUT)
        if errors:
            raise self.sender.on_session_error(connection, self._session_error(errors))

    def stuck(self, seconds: float) -> set[str]:
        """Return the names of session loops whose current step takes more than ``seconds``."""
        return {task.name for task in self._tasks if task.stuck(seconds)}

    def _heartbeat(self, connection: Connection) -> HeartbeatLoop:
        return HeartbeatLoop(
            connection,
            self._backend,
            self._counters,
            self._metrics.heartbeat,
            interval=min(self._heartbeat_seconds, connection.hello_ack.heartbeat_seconds),
            enabled=self._settings.heartbeat,
            status=None if self._settings.status_disabled else partial(self._status, connection),
        )

    def _status(self, connection: Connection) -> bytes:
        """Return the payload of an ``agent_status`` frame.

        The first ``agent_status`` frame of a session also counts the connection failures that
        occurred before the session was established.
        """
        failures, connection.failures_before = connection.failures_before, {}
        return self._metrics.status(failures, connection.connected_at, self._identity.current)

    def _session_error(self, errors: Sequence[AgentError]) -> AgentError:
        """Return the error that names the cause of the session's end.

        The receiver's error is preferred, because it contains a close code.
        The sender's error only states that the connection was lost.
        """
        coded = [error for error in errors if getattr(error, "code", None) is not None]
        error = next(
            (each for each in errors if isinstance(each, RemoteError)), (coded or errors)[0]
        )
        if getattr(error, "code", None) == close_codes.SESSION_REPLACED:
            # Another process uses the same worker id.
            # With one id, the two processes would replace each other's sessions for ever.
            self._identity.change_worker_id()
        return close_codes.explain_limit(error)

    def _run_loop(
        self,
        connection: Connection,
        run: Callable[[], None],
        name: str,
        errors: list[AgentError],
    ) -> None:
        try:
            run()
        except AgentError as error:
            if not connection.closing.is_set():
                errors.append(error)
        except Exception as error:
            self._counters.restarts[name] += 1
            logger.exception(
                "z4j: loop %s died; its session ends and a new one starts; please report it", name
            )
            # Report the exception as an ``AgentError``, so that the supervisor delays the next
            # connect.
            errors.append(AgentError(f"loop {name} died of {type(error).__name__}"))
        finally:
            if not self._backend.forked():
                connection.close()


class Supervisor:
    """Runs one session after another until it is stopped, and decides when to connect.

    :param hello: returns the ``hello`` frame; called at each connect, because capabilities can
        change.
    :param secret: returns the project's key; called at each connect, because the key can be
        rotated.
    :param serve: runs a session's loops; returns or raises an error when the session has ended.
    """

    def __init__(
        self,
        transport: Callable[[], ITransport],
        hello: Callable[[], bytes],
        secret: Callable[[], bytes],
        serve: Callable[[Connection], None],
        backend: BaseConcurrency,
        counters: Counters,
    ) -> None:
        self.backoff = ReconnectBackoff()
        self.clock = ClockCheck(backend)
        #: The current session's connection, if there is a session.
        self.connection: Connection | None = None
        self._make_transport = transport
        self._hello = hello
        self._secret = secret
        self._serve = serve
        self._backend = backend
        self._counters = counters
        self._reconnect_requested = backend.event()
        self._log = ReconnectLog(backend)
        self._transport: ITransport | None = None
        self._attempted = False
        self._stopped = False

    @property
    def is_active(self) -> bool:
        """Whether a session or a connect is in progress, or no connect has been attempted."""
        return not self._attempted or self._transport is not None

    def run(self, stop_event: IEvent) -> None:
        """Run one session after another until ``stop_event`` is set.

        A short script may call ``AgentRuntime.stop`` before this loop has run. Therefore the first
        connect is attempted even if ``stop_event`` is already set, unless :meth:`stop` was called.
        """
        while not (stop_event.is_set() and self._attempted) and not self._stopped:
            try:
                self._run_session()
            except InterpreterShutdownError:
                return
            except AgentError as error:
                self._on_failure(error, stop_event)

    def reconnect(self) -> None:
        """End the session, if there is one, and connect without a delay.

        Any task may call this method. Never waits.
        """
        self._reconnect_requested.set()
        if self.connection is not None:
            self.connection.close()

    def beat(self) -> None:
        """Send a heartbeat at once, if there is a session. Never waits."""
        if self.connection is not None:
            self.connection.beat.set()

    def stop(self) -> None:
        """End the session or the connection attempt. The caller has set ``stop_event`` before."""
        self._stopped = True
        self.reconnect()
        if self._transport is not None:
            self._transport.abort()

    def _run_session(self) -> None:
        transport = self._transport = self._make_transport()
        self._attempted = True
        try:
            hello_ack = parse_hello_ack(transport.connect(self._hello()))
            connection = Connection(transport, Session(hello_ack, self._secret()), self._backend)
            self.connection = connection
            if not self._stopped:
                self._serve_connection(connection)
        finally:
            self.connection = self._transport = None
            transport.close()

    def _serve_connection(self, connection: Connection) -> None:
        began = self._backend.now()
        self._on_connected(connection)
        try:
            self._serve(connection)
        except (RemoteError, NetworkError) as error:
            raise self.clock.explain(error, connection, ask=not self._stopped) from None
        finally:
            connection.close()
            self.backoff.on_session_end(self._backend.now() - began)

    def _on_connected(self, connection: Connection) -> None:
        self._reconnect_requested.clear()
        self._counters.sessions += 1
        self._counters.transport = connection.transport.name
        self._counters.last_error = ""
        connection.failures_before = self.backoff.on_connected()
        self._log.on_connected(connection.transport.name, connection.hello_ack.session_id)
        if self._log.failures:
            connection.on_accepted = self._log.on_accepted
            self._backend.spawn(self._log.watch, connection, name="z4j-reconnect-log")

    def _on_failure(self, error: AgentError, stop_event: IEvent) -> None:
        if stop_event.is_set():
            return
        self._counters.last_error = str(error)
        self._counters.turned_away = isinstance(error, TurnedAwayError)
        delay = self.backoff.next(error)
        self._log.on_failure(failure_class(error), error, delay)
        if self.clock.wait(self._reconnect_requested, delay):
            self._log.on_clock_set()
        self._reconnect_requested.clear()


class BackgroundLoops:
    """Runs the loops that last as long as the agent; logs, counts and restarts loops that fail.

    Without a restart, a failed loop can lose data for days (posthog-python #865).

    :param on_end: called by :meth:`join` after the wait for the loops.
    """

    def __init__(
        self,
        backend: BaseConcurrency,
        counters: Counters,
        on_end: Callable[[], object] | None = None,
    ) -> None:
        self.stop_event: IEvent = backend.event()
        self._backend = backend
        self._counters = counters
        self._on_end = on_end
        self._added: list[tuple[Callable[[IEvent], None], str]] = []
        self._wakes: list[Callable[[], object]] = [self.stop_event.set]
        self._tasks: list[Task] = []

    def add(
        self,
        run: Callable[[IEvent], None],
        name: str,
        *,
        wake: Callable[[], object] | None = None,
    ) -> None:
        """Add a loop that :meth:`start` spawns.

        :param wake: wakes the loop from its own wait, so that the loop checks ``stop_event``.
        """
        self._added.append((run, name))
        if wake is not None:
            self._wakes.append(wake)

    def start(self) -> None:
        """Spawn the added loops."""
        for run, name in self._added:
            self.spawn(run, name)

    def spawn(self, run: Callable[[IEvent], None], name: str, *, join: bool = True) -> Task:
        """Call ``run(stop_event)`` in a task, and call it again whenever it raises an exception.

        :param join: whether :meth:`join` waits for the task and :meth:`stuck` reports it.
        """
        task = self._backend.spawn(self._run_with_restarts, run, name, name=name)
        if join:
            self._tasks.append(task)
        return task

    def signal_stop(self) -> None:
        """Set ``stop_event`` and wake the loops. Never waits."""
        for wake in self._wakes:
            wake()

    def join(self, deadline: float) -> None:
        """Wait for the loops, and then for ``on_end``, until ``deadline``.

        ``deadline`` is in seconds of the backend's monotonic clock.
        """
        for task in self._tasks:
            task.join(max(0.0, deadline - self._backend.now()))
        if self._on_end is not None:
            run_until(deadline, self._on_end, self._backend)

    def stuck(self, seconds: float) -> set[str]:
        """Return the names of loops that have ended, or whose step takes more than ``seconds``."""
        return {task.name for task in self._tasks if task.stuck(seconds) or not task.alive()}

    def _run_with_restarts(self, run: Callable[[IEvent], None], name: str) -> None:
        delays = Backoff(RESTART_DELAY, RESTART_DELAY_MAX)
        while not self.stop_event.is_set():
            began = self._backend.now()
            try:
                run(self.stop_event)
            except InterpreterShutdownError:
                return
            except Exception:
                if self._backend.now() - began > RESTART_DELAY_MAX:
                    delays.reset()
                delay = delays.next()
                self._counters.restarts[name] += 1
                logger.exception(
                    "z4j: loop %s died and runs again in %.0f s; please report it", name, delay
                )
                self._backend.wait(self.stop_event, delay)


def run_until(deadline: float, function: Callable[[], object], backend: BaseConcurrency) -> None:
    """Run ``function`` in its own task, and wait for the task until ``deadline``.

    ``deadline`` is in seconds of the backend's monotonic clock. If no task can be started because
    the interpreter is shutting down, ``function`` runs in the caller's task.
    """
    try:
        task = backend.spawn(function, name="z4j-stop")
    except InterpreterShutdownError:
        function()
        return
    task.join(max(0.0, deadline - backend.now()))
