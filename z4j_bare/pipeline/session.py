"""Connect, serve, wait, again: the only place that decides when to call the brain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import AgentError, InterpreterShutdownError, RemoteError
from z4j_bare.pipeline.link import Connection
from z4j_bare.wire.backoff import BACKOFF_POLICIES, ReconnectBackoff, failure_class
from z4j_bare.wire.close_codes import explain_signature_error
from z4j_bare.wire.session import Session, parse_hello_ack

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.monitoring.metrics import Counters

logger = logging.getLogger("z4j.runtime.supervisor")

#: Every how many failures in a row one is logged again. The first always is, and one of another class: it asks for another
#: cure.
LOG_EVERY = 10


class Supervisor:
    """Runs one session after another until told to stop.

    :param transport: makes an ``ITransport`` for one session.
    :param hello: makes the ``hello`` frame; called at each connect, because capabilities can change.
    :param secret: returns the project's key; called at each connect, because it can be rotated.
    :param serve: runs a session's loops and returns, or raises, when it is over.
    """

    def __init__(
        self,
        transport: Callable[[], Any],
        hello: Callable[[], bytes],
        secret: Callable[[], bytes],
        serve: Callable[[Connection], None],
        backend: BaseConcurrency,
        counters: Counters,
    ) -> None:
        self.backoff = ReconnectBackoff()
        self.link: Connection | None = None
        #: When the last session began, in seconds since the epoch, and the failures in a row that it ended.
        self.connected_at = 0.0
        self.overcome: dict[str, int] = {}
        self._transport = transport
        self._hello = hello
        self._secret = secret
        self._serve = serve
        self._backend = backend
        self._counters = counters
        self._now = backend.event()
        self._failures = 0
        self._kind = ""
        self._attempt: Any = None
        self._begun = False
        self._ended = False

    @property
    def busy(self) -> bool:
        """Whether a session stands or may yet come without a pause before it: there is something to wait for."""
        return not self._begun or self._attempt is not None

    def run(self, stop_event: Any) -> None:
        """Keep a session until ``stop_event`` (an ``IEvent``) is set.

        The first attempt is made even then, unless ``end`` was called: a script may be over before its loops have run.
        """
        while not (stop_event.is_set() and self._begun) and not self._ended:
            try:
                self._session()
            except InterpreterShutdownError:
                return
            except AgentError as error:
                self._after(error, stop_event)

    def reconnect(self) -> None:
        """End the session, if there is one, and connect now. Callable from any task; never waits."""
        self._now.set()
        if self.link is not None:
            self.link.shut()

    def end(self) -> None:
        """End the session, or the attempt at one, for good; ``stop_event`` has been set."""
        self._ended = True
        self.reconnect()
        if self._attempt is not None:
            self._attempt.abort()

    def _session(self) -> None:
        transport = self._attempt = self._transport()
        self._begun = True
        try:
            hello_ack = parse_hello_ack(transport.connect(self._hello()))
            link = Connection(transport, Session(hello_ack, self._secret()), self._backend)
            self.link = link
            if not self._ended:
                self._stand(link)
        finally:
            self.link = self._attempt = None
            transport.close()

    def _stand(self, link: Connection) -> None:
        began = self._backend.now()
        self._welcome(link)
        try:
            self._serve(link)
        except RemoteError as error:
            raise explain_signature_error(error, link.behind) from None
        finally:
            stood = self._backend.now() - began
            self.backoff.on_session_end(stood)
            if stood >= BACKOFF_POLICIES["connection"].reset_after:
                self._failures = 0

    def _welcome(self, link: Connection) -> None:
        self._now.clear()
        self._counters.sessions += 1
        self._counters.transport = link.transport.name
        self._counters.last_error = ""
        self.connected_at, self.overcome = self._backend.wall(), self.backoff.on_connected()
        if not self._failures:
            logger.info(
                "z4j: connected over %s, session %s", link.transport.name, link.hello_ack.session_id
            )
        else:
            # One failure after each welcome is a session that does not hold; no reason for a line each time.
            level = (
                logging.INFO
                if sum(self.overcome.values()) > 1 or self._failures == 1
                else logging.DEBUG
            )
            logger.log(level, "z4j: connected again after %d failed attempts", self._failures)

    def _after(self, error: AgentError, stop_event: Any) -> None:
        if stop_event.is_set():
            return
        self._counters.last_error = str(error)
        delay, kind = self.backoff.next(error), failure_class(error)
        level = logging.DEBUG if self._failures % LOG_EVERY else logging.INFO
        if self._failures == 0 or kind != self._kind:
            level = logging.WARNING
        self._failures += 1
        self._kind = kind
        logger.log(level, "z4j: no session (%s): %s; next attempt in %.0f s", kind, error, delay)
        self._backend.wait(self._now, delay)
        self._now.clear()
