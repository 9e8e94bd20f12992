"""Receives Celery's own events from the broker, in a process outside a worker.

Such a process is the standalone agent, a web process or a script. Celery's signals do not fire in
such a process.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.timeslice import SLICE_SECONDS
from z4j_bare.engines.celery.broker_errors import explain_refusal, is_refusal
from z4j_bare.engines.celery.engine import broker_connection
from z4j_bare.errors import ForkedChildError, InterpreterShutdownError
from z4j_bare.interfaces import IEvent
from z4j_bare.wire.backoff import Backoff

if TYPE_CHECKING:
    from celery import Celery
    from kombu import Connection, Message

    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.engines.celery.event_receiver")

#: Maximum seconds of one wait for events.
POLL_TIMEOUT = 0.5

#: Seconds from a connection's first failure to the next attempt.
#: On Redis the events that are sent in this time are lost.
BACKOFF_INITIAL = 0.5

#: Maximum seconds from a repeated failure to the next attempt.
BACKOFF_MAX = 15.0

#: Seconds after which a connection counts as stable. The failure of a stable connection starts a
#: new back-off.
STABLE_SECONDS = 60.0

#: Seconds without an event after which a connection that has delivered events is renewed.
#: Redis does not detect a lost peer. Workers send a heartbeat every 2 s.
SILENCE_TIMEOUT = 90.0

#: During a stop, the receiver reads until no event has arrived for this many seconds.
DRAIN_IDLE = 0.2

#: Maximum seconds for which the receiver reads the last events during a stop.
DRAIN_MAX = 1.0

_HUBS = frozenset({"gevent", "eventlet"})


def patched_late() -> bool:
    """Return whether kombu was imported before patching. If so, it uses the original ``select``."""
    from kombu.utils import eventio

    return eventio._selectf is not select.select  # noqa: SLF001 - no public equivalent


class EventReceiver:
    """Reads the event exchange of a Celery app.

    :param on_event: called with each decoded event. If the call raises, the event counts as
        unreadable.
    :param on_tick: called after each wait for events. The call must neither wait nor raise.
    """

    name = "z4j-celery-events"

    def __init__(
        self,
        app: Celery,
        on_event: Callable[[dict[str, Any]], None],
        on_tick: Callable[[], None],
        backend: BaseConcurrency,
    ) -> None:
        #: Number of failed connections.
        self.failures = 0
        #: Number of events that could not be decoded or translated.
        self.unreadable = 0
        self._app = app
        self._on_event = on_event
        self._on_tick = on_tick
        self._backend = backend
        self._delays = Backoff(BACKOFF_INITIAL, BACKOFF_MAX)
        self._messages = 0
        self._yielded_at = 0.0
        self._finished = backend.event()
        self._finished.set()

    def run(self, stop_event: IEvent) -> None:
        """Read all events sent before ``stop_event`` is set. Renew a failed connection."""
        if self._backend.name in _HUBS and patched_late():
            logger.warning(
                "z4j: this process imported kombu before it was patched for %s. Waiting for the"
                " broker would block the hub, so Celery's events are not read from the broker."
                " Patch before kombu is imported; for gunicorn with preload_app, patch in its"
                " configuration file",
                self._backend.name,
            )
            self._backend.wait(stop_event)
            return
        self._finished.clear()
        try:
            while not stop_event.is_set():
                started_at = self._backend.now()
                try:
                    self._session(stop_event)
                except (ForkedChildError, InterpreterShutdownError):
                    raise
                except Exception as error:
                    if self._backend.now() - started_at > STABLE_SECONDS:
                        self._delays.reset()
                    self._on_failure(error)
                    self._backend.wait(stop_event, self._delays.next())
        finally:
            if not self._backend.forked():
                self._finished.set()

    def finish(self) -> None:
        """Wait until all events sent before ``stop_event`` was set have been read.

        Takes at most ``POLL_TIMEOUT + DRAIN_MAX`` seconds.
        """
        self._backend.wait(self._finished, POLL_TIMEOUT + DRAIN_MAX)

    def _session(self, stop_event: IEvent) -> None:
        connection = broker_connection(self._app, reading=True)
        try:
            self._backend.call_blocking(self._subscribe, connection)
            self._listen(connection, stop_event)
            self._drain_last(connection)
        finally:
            # A forked child that released the connection would cancel its parent's subscription.
            if not self._backend.forked():
                self._backend.call_blocking(_release, connection)

    def _on_failure(self, error: Exception) -> None:
        self.failures += 1
        # The text of an error may contain the broker's password; an explanation does not.
        cause = explain_refusal(error, self._app) if is_refusal(error) else type(error).__name__
        logger.log(
            logging.WARNING if self._delays.delay == BACKOFF_INITIAL else logging.DEBUG,
            "z4j: cannot read Celery's events from the broker (%s); retrying until it works",
            cause,
        )

    def _subscribe(self, connection: Connection) -> None:
        connection.connect()  # without this call the first use would retry without a limit
        receiver = self._app.events.Receiver(connection)
        consumer = connection.Consumer(
            queues=[receiver.queue],
            callbacks=[self._on_message],
            no_ack=True,
            accept=receiver.accept,
            on_decode_error=self._on_decode_error,
        )
        consumer.consume()

    def _listen(self, connection: Connection, stop_event: IEvent) -> None:
        last_message_at, messages = self._backend.now(), self._messages
        while not stop_event.is_set():
            self._drain(connection, POLL_TIMEOUT)
            connection.heartbeat_check()
            self._on_tick()
            now = self._backend.now()
            if self._messages != messages:
                last_message_at, messages = now, self._messages
            elif messages and now - last_message_at > SILENCE_TIMEOUT:
                logger.debug("z4j: no event for %.0f s; reconnecting", SILENCE_TIMEOUT)
                return

    def _drain_last(self, connection: Connection) -> None:
        deadline = self._backend.now() + DRAIN_MAX
        while self._backend.now() < deadline and self._drain(connection, DRAIN_IDLE):
            pass

    def _drain(self, connection: Connection, timeout: float) -> bool:
        """Read messages for at most ``timeout`` seconds; return whether anything arrived."""
        before = self._messages
        try:
            self._backend.call_blocking(connection.drain_events, timeout=timeout)
        except TimeoutError as error:
            if error.errno is not None:  # an error of the network, such as ETIMEDOUT
                raise
            return False
        if self._messages == before:
            # The transport may return many times in a row without a message. Without a sleep, these
            # returns would block the hub.
            self._backend.sleep(SLICE_SECONDS)
        return True

    def _on_message(self, body: list[dict[str, Any]] | dict[str, Any], _message: Message) -> None:
        step = self._backend.steps.begin()
        self._messages += 1
        for event in body if isinstance(body, list) else [body]:
            try:
                self._on_event(event)
            except Exception as error:
                self.unreadable += 1
                logger.debug("z4j: malformed Celery event: %s", type(error).__name__)
        self._backend.steps.end(step, self.name)
        if perf_counter() - self._yielded_at > SLICE_SECONDS:  # one read may deliver many messages
            self._backend.sleep(0)
            self._yielded_at = perf_counter()

    def _on_decode_error(self, _message: Message, error: Exception) -> None:
        self._messages += 1
        self.unreadable += 1
        logger.debug("z4j: undecodable message on the event exchange: %s", type(error).__name__)


def _release(connection: Connection) -> None:
    try:
        connection.release()
    except Exception as error:
        logger.debug("z4j: closing the broker connection failed: %s", type(error).__name__)
