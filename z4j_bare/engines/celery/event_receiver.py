"""Celery's events as the broker has them, for processes in which the signals do not fire.

That is a prefork worker's own process, whose children have the signals, and any process that is no worker: the standalone
agent, a web process, a script.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.timeslice import SLICE_SECONDS
from z4j_bare.engines.celery.engine import broker_connection
from z4j_bare.errors import ForkedChildError, InterpreterShutdownError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.capture.broker")

#: Seconds of one wait for events.
TURN = 0.5

#: Seconds before a broken connection is renewed: first, and at most. On Redis what is sent meanwhile is lost.
FIRST = 0.5
LONGEST = 15.0

#: Seconds after which a connection counts as a good one, and the next failure as the first again.
STEADY = 60.0

#: Seconds of silence on a line that has spoken after which it is renewed: Redis does not say that a peer has vanished, and
#: workers send a heartbeat every 2 s.
SILENCE = 90.0

#: Seconds at the end: without an event, after which there are no more to come, and in all.
QUIET = 0.2
LAST = 1.0

_HUBS = frozenset({"gevent", "eventlet"})


def patched_late() -> bool:
    """Whether kombu waits in the ``select`` of before the patching; it also remembers that there was none."""
    from kombu.utils import eventio

    return eventio._selectf is not select.select  # noqa: SLF001 - no public equivalent


class EventReceiver:
    """Reads the event exchange of a Celery app and hands each event to ``take``.

    :param take: gets a decoded event; it may raise for garbage, which is counted.
    :param tend: called at each turn; neither waits nor raises.
    """

    name = "z4j-celery-events"

    def __init__(
        self,
        app: Any,
        take: Callable[[dict[str, Any]], None],
        tend: Callable[[], None],
        backend: BaseConcurrency,
    ) -> None:
        #: Connections that failed, and events that could not be read.
        self.failures = 0
        self.unreadable = 0
        self._app = app
        self._take = take
        self._tend = tend
        self._backend = backend
        self._streak = 0
        self._messages = 0
        self._yielded = 0.0
        self._over = backend.event()
        self._over.set()

    def run(self, stop_event: Any) -> None:
        """Read until ``stop_event`` is set, and then what has been sent up to then. A lost broker is waited for."""
        if self._backend.name in _HUBS and patched_late():
            logger.warning(
                "z4j: this process was patched after it had imported kombu, whose waits would hold up the hub: nothing is"
                " read from the broker. Patch first, for a preloaded application in gunicorn's configuration file"
            )
            self._backend.wait(stop_event)
            return
        self._over.clear()
        try:
            while not stop_event.is_set():
                began = self._backend.now()
                try:
                    self._session(stop_event)
                except (ForkedChildError, InterpreterShutdownError):
                    raise
                except Exception as error:
                    if self._backend.now() - began > STEADY:
                        self._streak = 0
                    self._failed(error)
                    self._backend.wait(
                        stop_event, min(FIRST * 2 ** min(self._streak - 1, 10), LONGEST)
                    )
        finally:
            if not self._backend.forked():
                self._over.set()

    def finish(self) -> None:
        """Wait until what was sent before ``stop_event`` has been read, a little longer than ``LAST`` at most."""
        self._backend.wait(self._over, TURN + LAST)

    def _session(self, stop_event: Any) -> None:
        connection = broker_connection(self._app, reading=True)
        try:
            self._backend.call_blocking(self._subscribe, connection)
            self._listen(connection, stop_event)
            self._drain_last(connection)
        finally:
            if (
                not self._backend.forked()
            ):  # the socket is the parent's, and so is the subscription that would be cancelled
                self._backend.call_blocking(_release, connection)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._streak += 1
        # The text may quote the broker's address with its password; the class says enough.
        logger.log(
            logging.WARNING if self._streak == 1 else logging.DEBUG,
            "z4j: cannot read Celery's events from the broker (%s); trying until it works",
            type(error).__name__,
        )

    def _subscribe(self, connection: Any) -> None:
        connection.connect()  # by itself kombu would try for ever
        receiver = self._app.events.Receiver(connection)
        consumer = connection.Consumer(
            queues=[receiver.queue],
            callbacks=[self._receive],
            no_ack=True,
            accept=receiver.accept,
            on_decode_error=self._refuse,
        )
        consumer.consume()

    def _listen(self, connection: Any, stop_event: Any) -> None:
        heard, messages = self._backend.now(), self._messages
        while not stop_event.is_set():
            self._drain(connection, TURN)
            connection.heartbeat_check()
            self._tend()
            now = self._backend.now()
            if self._messages != messages:
                heard, messages = now, self._messages
            elif messages and now - heard > SILENCE:
                logger.debug("z4j: no event for %.0f s; connecting anew", SILENCE)
                return

    def _drain_last(self, connection: Any) -> None:
        deadline = self._backend.now() + LAST
        while self._backend.now() < deadline and self._drain(connection, QUIET):
            pass

    def _drain(self, connection: Any, seconds: float) -> bool:
        """Take what has come, waiting at most ``seconds``; return whether anything had."""
        before = self._messages
        try:
            self._backend.call_blocking(connection.drain_events, timeout=seconds)
        except TimeoutError as error:
            if error.errno is not None:  # not ours, but the network's
                raise
            return False
        if (
            self._messages == before
        ):  # the transport's own business; should it repeat, it must not keep the hub busy
            self._backend.sleep(SLICE_SECONDS)
        return True

    def _receive(self, body: Any, _message: Any) -> None:
        step = self._backend.steps.begin()
        self._messages += 1
        for event in body if isinstance(body, list) else [body]:
            try:
                self._take(event)
            except Exception as error:
                self.unreadable += 1
                logger.debug("z4j: an event of Celery's cannot be read: %s", type(error).__name__)
        self._backend.steps.end(step, self.name)
        if (
            perf_counter() - self._yielded > SLICE_SECONDS
        ):  # kombu may hand over a whole burst in one go
            self._backend.sleep(0)
            self._yielded = perf_counter()

    def _refuse(self, _message: Any, error: Exception) -> None:
        self._messages += 1
        self.unreadable += 1
        logger.debug(
            "z4j: a message on the event exchange cannot be decoded: %s", type(error).__name__
        )


def _release(connection: Any) -> None:
    try:
        connection.release()
    except Exception as error:
        logger.debug("z4j: closing the broker's connection failed: %s", type(error).__name__)
