"""Which transport carries a session: WebSocket wherever it gets through, long-poll behind proxies that block it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from z4j_bare.errors import AgentError, HostConfigurationError, NetworkError, RemoteError
from z4j_bare.interfaces import ITransport
from z4j_bare.transport.endpoint import longpoll_url, websocket_url
from z4j_bare.transport.tls import tls_context
from z4j_bare.transport.websocket import WebSocketTransport
from z4j_bare.transport.websocket import preload as preload_websocket

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.pipeline.link import Connection
    from z4j_bare.settings import Settings
    from z4j_bare.transport.http import Answer
    from z4j_bare.transport.longpoll import LearnedLimits, LongPollTransport

logger = logging.getLogger("z4j.runtime.fallback")

AUTO, WS, LONGPOLL = "auto", "ws", "longpoll"

#: Seconds from one look at WebSocket to the next while long-poll is in use: first, and at most; each one doubles.
FIRST = 60.0
LONGEST = 3600.0

#: Failures in a row that make a blocked WebSocket, where each alone could be chance.
STRIKES = 2

#: Seconds for the health route to answer.
HEALTH_TIMEOUT = 5.0

#: Codes from here on are a WebSocket's close codes, below they are HTTP statuses.
_CLOSE_CODES = 1000
_SERVER_ERRORS = 500
_TOO_MANY = 429


class FallbackPolicy:
    """The policy, without I/O. Every method takes ``now``, monotonic seconds."""

    def __init__(self, wish: str = AUTO) -> None:
        self.wish = wish
        #: What carries sessions now; ``auto`` begins with WebSocket.
        self.name = LONGPOLL if wish == LONGPOLL else WS
        #: When WebSocket is worth another look.
        self.due = float("inf")
        self.interval = FIRST
        self._strikes = 0
        self._back_at = float("-inf")

    def begin(self, now: float) -> str:
        """Return the transport to try for the next session."""
        return WS if now >= self.due else self.name

    def failed(self, error: AgentError, now: float, reachable: Callable[[], bool]) -> bool:
        """Take a failed WebSocket connect; return whether long-poll is to be tried at once.

        An HTTP status in place of 101 is plain; server errors, resets and silence have to happen twice. All count only
        while the brain's health route is ``reachable``, which is asked last because it costs a request. 401 and 403 are
        no exception: the brain refuses tokens after the upgrade, so those come from something in between, and where they
        do not, the long-poll probe is refused too.
        """
        if self.wish != AUTO:
            return False
        if self.name == LONGPOLL:
            self.postpone(now)
            return _suspicious(error) > 0
        self._strikes = self._strikes + _suspicious(error) if _suspicious(error) else 0
        if self._strikes < STRIKES or not reachable():
            return False
        self.name = LONGPOLL
        self._strikes = 0
        if (
            now - self._back_at > self.interval
        ):  # else it worked for a moment only: look again later and later
            self.interval = FIRST
        self.due = now + self.interval
        return True

    def postpone(self, now: float) -> None:
        """WebSocket still does not get through."""
        self.interval = min(LONGEST, self.interval * 2)
        self.due = now + self.interval

    def welcomed(self, name: str, now: float) -> None:
        """Take a session that stands over ``name``."""
        if name == WS and self.wish == AUTO:
            self._strikes = 0
            if self.name == LONGPOLL:
                self._back_at = now
            self.name, self.due = WS, float("inf")

    def refused(self, error: AgentError) -> None:
        """Take a failed long-poll connect: where that is what gets refused, WebSocket is the better try."""
        strange = isinstance(error, NetworkError) and error.code in (400, 404, 405)
        if self.wish == AUTO and (strange or isinstance(error, RemoteError)):
            self.name, self.due = WS, float("inf")


def _suspicious(error: AgentError) -> int:
    """Return how much ``error`` speaks for something that blocks WebSocket: 0 not at all, ``STRIKES`` beyond doubt."""
    code = getattr(error, "code", None)
    if not isinstance(code, int):  # that of a configuration error is a word
        return 1 if isinstance(error, NetworkError) else 0
    if code >= _CLOSE_CODES or code == _TOO_MANY:
        return 0  # who closes with a code speaks WebSocket with us, and who asks for patience would be asked more often
    return (
        1 if code >= _SERVER_ERRORS else STRIKES
    )  # 502 is also what a brain behind its proxy looks like while it starts


class TransportFactory:
    """Makes the transport of each session, by setting or by what gets through.

    :param wish: ``auto``, ``ws`` or ``longpoll``.
    :param token: called at every connect.

    Loads certificates, and the library that will be needed, now: on a hub later it would hold up the host.
    """

    def __init__(
        self,
        brain_url: str,
        wish: str,
        token: Callable[[], str],
        settings: Settings,
        backend: BaseConcurrency,
        *,
        dev_mode: bool,
    ) -> None:
        if wish not in (AUTO, WS, LONGPOLL):
            raise HostConfigurationError(f"Z4J_TRANSPORT={wish!r} is none of auto, ws, longpoll")
        self.choice = FallbackPolicy(wish)
        self._ws_url = websocket_url(brain_url, dev_mode=dev_mode)
        self._api_url = longpoll_url(brain_url, dev_mode=dev_mode)
        self._token = token
        self._backend = backend
        self._known: LearnedLimits | None = None
        self._tls = None
        if self._ws_url.startswith("wss:"):
            self._tls = tls_context(settings.ca_bundle, settings.client_cert, settings.client_key)
        if wish == LONGPOLL:
            import z4j_bare.transport.http
            import z4j_bare.transport.longpoll  # noqa: F401
        else:
            preload_websocket()

    def transport(self) -> Any:
        """Return the ``ITransport`` of the next session."""
        makers = {AUTO: self._either, WS: self.websocket, LONGPOLL: self.longpoll}
        return makers[self.choice.wish]()

    def websocket(self) -> WebSocketTransport:
        """Return a new WebSocket transport."""
        return WebSocketTransport(self._ws_url, self._token, self._backend, self._tls)

    def longpoll(self) -> LongPollTransport:
        """Return a new long-poll transport."""
        longpoll = self._backend.import_module("z4j_bare.transport.longpoll")  # few workers need it
        self._known = self._known or longpoll.LearnedLimits()
        made: LongPollTransport = longpoll.LongPollTransport(
            self._api_url, self._token, self._backend, self._known, self._tls
        )
        return made

    def reachable(self) -> bool:
        """Whether the brain's health route answers."""
        try:
            return self.health(HEALTH_TIMEOUT).status == 200  # noqa: PLR2004 - HTTP
        except NetworkError:
            return False

    def health(self, timeout: float) -> Answer:
        """Return what the brain's health route says. Raises ``NetworkError``."""
        client = self._backend.import_module("z4j_bare.transport.http").Client(
            self._api_url, {}, self._backend, self._tls
        )
        try:
            answer: Answer = client.call("GET", "/health", timeout=timeout)
            return answer
        finally:
            client.close()

    def passable(self) -> bool:
        """Whether a WebSocket upgrade gets through."""
        attempt = self.websocket()
        try:
            attempt.upgrade()
            return True
        except AgentError as error:
            logger.debug("z4j: WebSocket still does not get through: %s", error)
            return False
        finally:
            attempt.close()

    def watches(self, link: Connection) -> bool:
        """Whether the session is one that :meth:`watch` should look after."""
        return self.choice.wish == AUTO and link.transport.name == LONGPOLL

    def watch(self, link: Connection) -> None:
        """Look at WebSocket now and then; return when it gets through and the session may end for it, or has ended."""
        while not self._backend.wait(link.closing, max(0.0, self.choice.due - self._backend.now())):
            if self.passable():
                self.choice.due = self._backend.now()
                link.transport.drain()
                return
            self.choice.postpone(self._backend.now())

    def _either(self) -> AutoTransport:
        return AutoTransport(self, self._backend)


@implementer(ITransport)
class AutoTransport:
    """One session over whichever transport gets through; the decision falls in ``connect``."""

    def __init__(self, routes: TransportFactory, backend: BaseConcurrency) -> None:
        self.name = routes.choice.name
        self.confirms = False
        self._routes = routes
        self._choice = routes.choice
        self._backend = backend
        self._inner: Any = None
        self._aborted = False

    def connect(self, hello: bytes) -> bytes:
        """Connect over WebSocket, over long-poll, or over the one after the other; see ``ITransport``."""
        choice, before = self._choice, self._choice.name
        if choice.begin(self._backend.now()) == WS:
            try:
                answer = self._enter(self._routes.websocket(), hello)
            except AgentError as error:
                self._inner.close()
                if not choice.failed(error, self._backend.now(), self._routes.reachable):
                    raise
                if before == WS:
                    wait = choice.interval
                    logger.warning(
                        "z4j: no WebSocket gets through (%s): using long-poll, next look in %.0f s",
                        error,
                        wait,
                    )
            else:
                if before == LONGPOLL:
                    logger.info("z4j: WebSocket gets through again")
                return answer
        try:
            return self._enter(self._routes.longpoll(), hello)
        except AgentError as error:
            choice.refused(error)
            raise

    def send(self, build: Callable[[], bytes]) -> int:
        """Send over what carries the session."""
        size: int = self._inner.send(build)
        return size

    def receive(self, timeout: float) -> bytes | None:
        """Receive from what carries the session."""
        message: bytes | None = self._inner.receive(timeout)
        return message

    def drain(self) -> None:
        """Let a long-poll session come to its end without losing a command."""
        self._inner.drain()

    def abort(self) -> None:
        """Break whatever there is of the session."""
        self._aborted = True
        if self._inner is not None:
            self._inner.abort()

    def close(self) -> None:
        """Release it."""
        if self._inner is not None:
            self._inner.close()

    def _enter(self, inner: Any, hello: bytes) -> bytes:
        self._inner = inner
        if self._aborted:
            raise NetworkError("the line is closed")
        answer: bytes = inner.connect(hello)
        self.name, self.confirms = inner.name, inner.confirms
        self._choice.welcomed(inner.name, self._backend.now())
        return answer
