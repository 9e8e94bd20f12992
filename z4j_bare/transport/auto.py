"""Chooses the transport of each session: WebSocket, or long-poll if a proxy blocks WebSocket."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from zope.interface import implementer

from z4j_bare.errors import (
    AgentError,
    HostConfigurationError,
    NetworkError,
    RemoteError,
    UnavailableError,
)
from z4j_bare.interfaces import ITransport
from z4j_bare.transport.endpoint import longpoll_url, tls_context, websocket_url
from z4j_bare.transport.websocket import WebSocketTransport
from z4j_bare.transport.websocket import preload as preload_websocket
from z4j_bare.wire import close_codes
from z4j_bare.wire.backoff import Backoff
from z4j_bare.wire.clock import offset_from_date

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.pipeline.session import Connection
    from z4j_bare.settings import Settings
    from z4j_bare.transport.http import Client, Response
    from z4j_bare.transport.longpoll import LearnedLimits, LongPollTransport

logger = logging.getLogger("z4j.runtime.transport.auto")

#: The values of ``Z4J_TRANSPORT``, and the names of the transports.
AUTO, WS, LONGPOLL = "auto", "ws", "longpoll"

#: Seconds from the fallback to long-poll to the first attempt to use WebSocket again.
#: Each failed attempt doubles the delay.
PROBE_DELAY_INITIAL = 60.0

#: Maximum seconds between two attempts to use WebSocket again.
PROBE_DELAY_MAX = 3600.0

#: Number of consecutive failures after which WebSocket counts as blocked. The number applies to
#: failures that can also have another cause, such as a timeout of the upgrade.
FAILURES_BEFORE_FALLBACK = 2

#: Timeout of a request to the brain's health route, in seconds.
HEALTH_TIMEOUT = 5.0

#: The lowest close code of WebSocket. Lower error codes are HTTP statuses.
_MIN_CLOSE_CODE = 1000

#: Codes that the brain itself sends when it fails, restarts or has too many clients (429).
#: They cause no fallback, because long-poll would send more requests to an overloaded brain.
_BRAIN_CODES = (1011, 1012, 1013, HTTPStatus.TOO_MANY_REQUESTS)


class FallbackPolicy:
    """Decides between WebSocket and long-poll.

    ``now`` is the monotonic time in seconds.

    :param preference: ``auto``, ``ws`` or ``longpoll``. The transport changes only with ``auto``.
    """

    def __init__(self, preference: str = AUTO) -> None:
        self.preference = preference
        #: The transport in use. ``auto`` begins with WebSocket.
        self.name = LONGPOLL if preference == LONGPOLL else WS
        #: Monotonic time of the next attempt to use WebSocket again; infinite if none is planned.
        self.next_probe_at = float("inf")
        self._probe_delay = Backoff(PROBE_DELAY_INITIAL, PROBE_DELAY_MAX)
        self._failures = 0
        self._recovered_at = float("-inf")

    @property
    def probe_interval(self) -> float:
        """Seconds from the fallback or a failed attempt to the next attempt to use WebSocket."""
        return self._probe_delay.delay

    def next_transport(self, now: float) -> str:
        """Return the name of the transport for the next session."""
        return WS if now >= self.next_probe_at else self.name

    def on_websocket_failure(
        self, error: AgentError, now: float, is_reachable: Callable[[], bool]
    ) -> bool:
        """Record a failed connect over WebSocket; return whether to use long-poll at once.

        An HTTP status below 500, except 429, indicates that WebSocket is blocked. A status of 500
        or more, and a reset, an end or a timeout of the upgrade, indicate a blocked WebSocket only
        if two such failures follow each other. A brain that cannot be reached, or that is silent
        after the upgrade, is no indication. The policy falls back to long-poll only if
        ``is_reachable()`` is true. This call requests the brain's health route.

        Statuses 401 and 403 are indications as well: a proxy has sent them, because the brain
        checks the token only after the upgrade. If the brain did send such a status, the brain also
        rejects the connect over long-poll.
        """
        if self.preference != AUTO:
            return False
        evidence = _blocking_evidence(error)
        if self.name == LONGPOLL:
            self.postpone_probe(now)
            return evidence > 0
        self._failures = self._failures + evidence if evidence else 0
        if self._failures < FAILURES_BEFORE_FALLBACK or not is_reachable():
            return False
        self.name = LONGPOLL
        self._failures = 0
        # The delay is reset only if WebSocket has worked for longer than the delay.
        if now - self._recovered_at > self.probe_interval:
            self._probe_delay.reset()
        self.next_probe_at = now + self.probe_interval
        return True

    def cancel_fallback(self) -> None:
        """Return to WebSocket, because WebSocket is not blocked or long-poll fails as well."""
        self.name, self.next_probe_at = WS, float("inf")

    def postpone_probe(self, now: float) -> None:
        """Record a failed attempt to use WebSocket: increase the delay before the next attempt."""
        self._probe_delay.increase()
        self.next_probe_at = now + self.probe_interval

    def on_connected(self, name: str, now: float) -> None:
        """Record the start of a session over the transport ``name``."""
        if name == WS and self.preference == AUTO:
            self._failures = 0
            if self.name == LONGPOLL:
                self._recovered_at = now
            self.name, self.next_probe_at = WS, float("inf")

    def on_longpoll_failure(self, error: AgentError) -> None:
        """Record a failed connect over long-poll. If the brain rejected it, use WebSocket next."""
        rejected = isinstance(error, NetworkError) and error.code in (400, 404, 405)
        if self.preference == AUTO and (rejected or isinstance(error, RemoteError)):
            self.cancel_fallback()


def _blocking_evidence(error: AgentError) -> int:
    """Return how strongly ``error`` indicates a blocked WebSocket.

    0 means no indication. ``FAILURES_BEFORE_FALLBACK`` means that one failure is enough.
    """
    if isinstance(error, UnavailableError):
        return 0
    code = getattr(error, "code", None)
    if not isinstance(code, int):  # the code of a configuration error is a string
        return 1 if isinstance(error, NetworkError) else 0
    if code >= close_codes.MIN_APPLICATION_CODE or code in _BRAIN_CODES:
        return 0
    if code >= _MIN_CLOSE_CODE:
        return 1  # before ``hello_ack`` a proxy is the likelier sender
    # A single status of 500 or more is not enough, because a proxy also returns 502 while the brain
    # starts.
    return 1 if code >= HTTPStatus.INTERNAL_SERVER_ERROR else FAILURES_BEFORE_FALLBACK


class TransportFactory:
    """Creates the transport of each session.

    The constructor loads the certificates and imports the library of the preferred transport. At a
    later time, both would block the hub.

    :param token: returns the token. Called at every connect.

    Raises ``HostConfigurationError`` if a setting is not valid.
    """

    def __init__(
        self,
        brain_url: str,
        preference: str,
        token: Callable[[], str],
        settings: Settings,
        backend: BaseConcurrency,
        *,
        dev_mode: bool,
    ) -> None:
        if preference not in (AUTO, WS, LONGPOLL):
            raise HostConfigurationError(
                f"Z4J_TRANSPORT={preference!r} is not valid: use auto, ws or longpoll"
            )
        self.policy = FallbackPolicy(preference)
        self._ws_url = websocket_url(brain_url, dev_mode=dev_mode)
        self._api_url = longpoll_url(brain_url, dev_mode=dev_mode)
        self._token = token
        self._backend = backend
        self._limits: LearnedLimits | None = None
        self._tls = None
        if self._ws_url.startswith("wss:"):
            self._tls = tls_context(settings.ca_bundle, settings.client_cert, settings.client_key)
        if preference == LONGPOLL:
            import z4j_bare.transport.http
            import z4j_bare.transport.longpoll  # noqa: F401
        else:
            preload_websocket()

    def create(self) -> ITransport:
        """Return the transport of the next session."""
        if self.policy.preference == WS:
            return self.websocket()
        if self.policy.preference == LONGPOLL:
            return self.longpoll()
        return AutoTransport(self, self._backend)

    def websocket(self) -> WebSocketTransport:
        """Return a new WebSocket transport."""
        return WebSocketTransport(self._ws_url, self._token, self._backend, self._tls)

    def longpoll(self) -> LongPollTransport:
        """Return a new long-poll transport."""
        # Imported late, because few processes use long-poll.
        longpoll = self._backend.import_module("z4j_bare.transport.longpoll")
        self._limits = self._limits or longpoll.LearnedLimits()
        transport: LongPollTransport = longpoll.LongPollTransport(
            self._api_url, self._token, self._backend, self._limits, self._tls
        )
        return transport

    def is_reachable(self) -> bool:
        """Return whether the brain's health route answers with status 200."""
        try:
            return self.health(HEALTH_TIMEOUT).status == HTTPStatus.OK
        except NetworkError:
            return False

    def clock_offset(self) -> float | None:
        """Ask the brain for its time; return by how many seconds it is ahead of this host's clock.

        Returns ``None`` without an answer.
        """
        began = self._backend.wall()
        try:
            response = self.health(HEALTH_TIMEOUT)
        except NetworkError:
            return None
        return offset_from_date(response.headers.get("Date"), (began + self._backend.wall()) / 2)

    def health(self, timeout: float) -> Response:
        """Request the brain's health route and return the response.

        Raises ``NetworkError`` if the connection fails, or no data arrives for ``timeout`` seconds.
        """
        http = self._backend.import_module("z4j_bare.transport.http")
        client: Client = http.Client(self._api_url, {}, self._backend, self._tls)
        try:
            return client.request("GET", "/health", timeout=timeout)
        finally:
            client.close()

    def probe_websocket(self) -> bool:
        """Return whether a WebSocket upgrade succeeds."""
        transport = self.websocket()
        try:
            transport.upgrade()
            return True
        except AgentError as error:
            logger.debug("z4j: WebSocket is still blocked: %s", error)
            return False
        finally:
            transport.close()

    def needs_recovery(self, connection: Connection) -> bool:
        """Return whether :meth:`monitor_recovery` must run during this session."""
        return self.policy.preference == AUTO and connection.transport.name == LONGPOLL

    def monitor_recovery(self, connection: Connection) -> None:
        """Probe WebSocket at growing intervals during a long-poll session.

        Returns when the session has ended. After a successful probe, drains the session and
        returns, so that the session ends and the next session uses WebSocket.
        """
        while not self._backend.wait(
            connection.closing, max(0.0, self.policy.next_probe_at - self._backend.now())
        ):
            if self.probe_websocket():
                self.policy.next_probe_at = self._backend.now()
                if isinstance(connection.transport, AutoTransport):
                    connection.transport.drain()
                return
            self.policy.postpone_probe(self._backend.now())


@implementer(ITransport)
class AutoTransport:
    """One session over the transport that ``connect`` chooses: WebSocket or long-poll."""

    def __init__(self, factory: TransportFactory, backend: BaseConcurrency) -> None:
        self.name = factory.policy.name
        self.synchronous_acks = False
        self._factory = factory
        self._policy = factory.policy
        self._backend = backend
        self._transport: WebSocketTransport | LongPollTransport | None = None
        self._aborted = False

    def connect(self, hello: bytes) -> bytes:
        """Connect over the policy's transport, or over long-poll after WebSocket has failed."""
        policy, previous = self._policy, self._policy.name
        if policy.next_transport(self._backend.now()) == WS:
            try:
                hello_ack = self._connect_over_websocket(hello)
            except AgentError as error:
                if not policy.on_websocket_failure(
                    error, self._backend.now(), self._factory.is_reachable
                ):
                    raise
                if previous == WS:
                    return self._confirm_fallback(hello, error)
            else:
                if previous == LONGPOLL:
                    logger.info("z4j: WebSocket works again: leaving long-poll")
                return hello_ack
        try:
            return self._connect_with(self._factory.longpoll(), hello)
        except AgentError as error:
            policy.on_longpoll_failure(error)
            raise

    def send(self, build: Callable[[], bytes]) -> int:
        """Send over the chosen transport; see ``ITransport``."""
        return self._connected().send(build)

    def receive(self, timeout: float) -> bytes | None:
        """Receive over the chosen transport; see ``ITransport``."""
        return self._connected().receive(timeout)

    def drain(self) -> None:
        """Drain a long-poll session; see ``LongPollTransport.drain``."""
        if self._transport is not None and not isinstance(self._transport, WebSocketTransport):
            self._transport.drain()

    def abort(self) -> None:
        """Abort the session or the running ``connect``."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Release the chosen transport."""
        if self._transport is not None:
            self._transport.close()

    def _confirm_fallback(self, hello: bytes, error: AgentError) -> bytes:
        """Connect over long-poll if only WebSocket fails; return the ``hello_ack``.

        The brain is reachable now, but it may have been restarting when WebSocket failed with
        ``error``. Therefore WebSocket is tried once more. The fallback counts only if WebSocket
        fails again and long-poll works.
        """
        try:
            return self._connect_over_websocket(hello)
        except AgentError as second:
            if not _blocking_evidence(second):
                self._policy.cancel_fallback()
                raise
        try:
            hello_ack = self._connect_with(self._factory.longpoll(), hello)
        except AgentError as second:
            self._policy.cancel_fallback()
            # The brain's own answer is clearer than the failure of the upgrade.
            raise second if isinstance(second, RemoteError) else error from None
        logger.warning(
            "z4j: WebSocket is blocked (%s): falling back to long-poll; "
            "retrying WebSocket in %.0f s",
            error,
            self._policy.probe_interval,
        )
        return hello_ack

    def _connect_over_websocket(self, hello: bytes) -> bytes:
        websocket = self._factory.websocket()
        try:
            return self._connect_with(websocket, hello)
        except AgentError:
            websocket.close()
            raise

    def _connected(self) -> WebSocketTransport | LongPollTransport:
        if self._transport is None:
            raise NetworkError("the connection is closed")
        return self._transport

    def _connect_with(
        self, transport: WebSocketTransport | LongPollTransport, hello: bytes
    ) -> bytes:
        self._transport = transport
        if self._aborted:
            raise NetworkError("the connection is closed")
        hello_ack = transport.connect(hello)
        self.name, self.synchronous_acks = transport.name, transport.synchronous_acks
        self._policy.on_connected(transport.name, self._backend.now())
        return hello_ack
