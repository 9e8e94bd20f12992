"""Probes of the brain: its health, its clock, the agent's token, WebSocket, a signed frame."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from z4j_bare.diagnostics.result import ProbeResult, failed, passed, skipped, warned
from z4j_bare.errors import (
    AgentError,
    AuthenticationRejectedError,
    FrameTooLargeError,
    HostConfigurationError,
    NetworkError,
    RemoteError,
)
from z4j_bare.settings import read_key, read_token
from z4j_bare.transport.auto import LONGPOLL, WS, TransportFactory
from z4j_bare.transport.error_text import printable
from z4j_bare.wire import close_codes, frames
from z4j_bare.wire.clock import describe_offset, offset_from_date
from z4j_bare.wire.session import Session, parse_hello_ack

if TYPE_CHECKING:
    from z4j_core.models import Config

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.settings import Settings
    from z4j_bare.transport.http import Response
    from z4j_bare.transport.longpoll import LongPollTransport

#: The clock probe warns if the clocks of host and brain differ by more than this number of seconds.
#: The probe fails if they differ by more than ``close_codes.MAX_CLOCK_SKEW``, because the brain
#: rejects signatures if the difference is 60 s or more.
SKEW_WARNING = 5.0

#: A message that is not a ``hello``.
#: If the token is valid, the brain closes the connection with the code ``_NOT_A_HELLO``.
_INVALID_HELLO = b"{}"
_NOT_A_HELLO = 4400

#: The brain's error message about an archived project contains one of these words.
_ARCHIVED = ("archive", "inactive", "not active")

_UNAUTHORIZED, _FORBIDDEN = 401, 403


class ProbeStep(NamedTuple):
    """A probe that is skipped if the probe with the name ``requires`` failed or was skipped."""

    name: str
    requires: str
    run: Callable[[], ProbeResult]


class BrainProbe:
    """Probes one brain. Call the probes in the order of :func:`brain_steps`, then ``close``.

    No probe sends a ``hello``, because a ``hello`` overwrites the agent's engines in the brain and
    claims the agent's pending commands. The token probe sends a long-poll request that claims no
    command. The WebSocket probe sends an invalid message, which the brain rejects after the check
    of the token (``docs/protocol.md``, Hello and Long-poll).

    Raises ``HostConfigurationError`` if a setting is invalid.

    :param timeout: maximum seconds until each answer of the brain.
    """

    def __init__(
        self, config: Config, settings: Settings, backend: BaseConcurrency, timeout: float = 5.0
    ) -> None:
        preference = settings.transport if settings.transport != "auto" else config.transport
        self._config = config
        self._settings = settings
        self._backend = backend
        self._timeout = timeout
        self._preference = preference
        self._transports = TransportFactory(
            str(config.brain_url),
            preference,
            lambda: read_token(config, settings),
            settings,
            backend,
            dev_mode=config.dev_mode,
        )
        self._brain_date: str | None = None
        self._brain_date_at = 0.0
        self._skew: float | None = None
        self._longpoll: LongPollTransport | None = None
        self._hello_ack = b""

    def close(self) -> None:
        """Close the connections."""
        if self._longpoll is not None:
            self._longpoll.close()
        self._backend.close()

    def health(self) -> ProbeResult:
        """Request the brain's health route and check that a brain answers."""
        began = self._backend.wall()
        try:
            answer = self._transports.health(self._timeout)
        except NetworkError as error:
            fix = "check the brain's log, and whether a proxy or a firewall cuts the connection"
            return failed("http", str(error), fix)
        self._brain_date = answer.headers.get("Date")
        self._brain_date_at = (began + self._backend.wall()) / 2
        if answer.status != 200:  # noqa: PLR2004 - HTTP
            cause, fix = _health_problem(answer)
            return failed("http", cause, fix, status=answer.status)
        if not _is_brain(answer.body):
            cause = "the health route is not answered by a brain"
            fix = (
                "set Z4J_BRAIN_URL to the brain's address; "
                "if a captive portal answers, log in to that network"
            )
            return failed("http", cause, fix, status=answer.status)
        return passed("http", "the brain is healthy", status=answer.status)

    def clock(self) -> ProbeResult:
        """Compare this host's clock with the brain's clock. Call :meth:`health` first."""
        skew = self._skew = offset_from_date(self._brain_date, self._brain_date_at)
        if skew is None:
            return skipped("clock", "the brain's answer has no Date header")
        details = {"skew_seconds": round(skew, 1)}
        cause = describe_offset(skew)
        if abs(skew) > close_codes.MAX_CLOCK_SKEW:
            cause += "; the brain rejects signatures from 60 s"
            fix = "run NTP (chrony, systemd-timesyncd) on both hosts"
            return failed("clock", cause, fix, **details)
        if abs(skew) > SKEW_WARNING:
            fix = (
                "run NTP (chrony, systemd-timesyncd) on both hosts; "
                "the brain rejects signatures from 60 s"
            )
            return warned("clock", cause, fix, **details)
        return passed(
            "clock", f"within {max(1.0, abs(skew)):.0f} s of the brain's clock", **details
        )

    def token(self) -> ProbeResult:
        """Check the token with a request that claims no command and stores nothing."""
        self._longpoll = self._transports.longpoll()
        try:
            self._hello_ack = self._longpoll.connect(unsent_hello())
        except HostConfigurationError as error:
            fix = "store the agent's token in the file, and make the file readable for this user"
            return failed("token", str(error), fix)
        except AgentError as error:
            return self._token_problem(error)
        return passed("token", "the brain accepts the token, and the project is active")

    def websocket(self) -> ProbeResult:
        """Upgrade a connection to WebSocket and exchange one message."""
        if self._preference == LONGPOLL:
            return skipped("websocket", "Z4J_TRANSPORT is longpoll")
        try:
            code, text = self._rejection_of_invalid_hello()
        except NetworkError as error:
            cause = f"WebSocket is blocked: {error}"
            fix = (
                "let the proxy pass the Upgrade and Connection headers "
                "(nginx: proxy_http_version 1.1), or set Z4J_TRANSPORT=longpoll"
            )
            return failed("websocket", cause, fix, status=error.code)
        details = {"remote_connection_verified": True}
        if code == _NOT_A_HELLO:
            return passed("websocket", "messages pass in both directions", **details)
        if code is None:
            cause = "the server is not a brain: it answered a message that a brain rejects"
            fix = (
                "check Z4J_BRAIN_URL, and to which server the proxy forwards WebSocket connections"
            )
            return failed("websocket", cause, fix, code=None, **details)
        cause = f"the brain closed the connection with code {code}"
        return failed("websocket", cause, text, code=code, **details)

    def signature(self) -> ProbeResult:
        """Send an empty event batch that the project's key signs. Call :meth:`token` first."""
        try:
            key = read_key(self._config, self._settings)
            session = Session(parse_hello_ack(self._hello_ack), key)
        except HostConfigurationError as error:
            fix = "copy the hmac_secret that the brain showed when the agent was created"
            return failed("signature", str(error), fix)
        except RemoteError as error:
            fix = "check that Z4J_BRAIN_URL is the brain's own address"
            return failed("signature", str(error), fix)
        frame_id, batch = frames.frame_id("ev"), frames.event_batch([])
        assert self._longpoll is not None  # noqa: S101 - token() has set it
        try:
            self._longpoll.send(
                lambda: session.sign("event_batch", frame_id, batch, self._backend.wall())
            )
        except AuthenticationRejectedError as error:
            return self._signature_problem(error)
        except (RemoteError, NetworkError, FrameTooLargeError) as error:
            cause = f"the brain did not accept a signed frame: {error}"
            return failed("signature", cause, "the brain's log has the reason")
        return passed(
            "signature",
            "the brain verified and acknowledged a signed frame",
            remote_authentication_verified=True,
        )

    def _token_problem(self, error: AgentError) -> ProbeResult:
        code, text = getattr(error, "code", None), str(error)
        answer = text.partition("(")[2].lower()
        if code == _FORBIDDEN and any(word in answer for word in _ARCHIVED):
            cause = f"the project {self._config.project_id} is archived"
            fix = "restore the project in the brain, or create an agent in another project"
            return failed("token", cause, fix, status=code)
        if code == _UNAUTHORIZED:
            cause = "the brain does not know the token, or it was revoked"
            fix = "copy Z4J_TOKEN (or Z4J_TOKEN_FILE) again, or create another agent"
            return failed("token", cause, fix, status=code)
        if isinstance(error, AuthenticationRejectedError):
            return failed("token", "the brain rejected this agent", text, status=code)
        if self._preference == WS:
            cause = f"the agent's HTTP routes do not answer: {text}"
            fix = "WebSocket works without these routes; long-poll and this probe need them"
            return warned("token", cause, fix, status=code)
        return failed("token", "the agent's HTTP routes do not answer", text, status=code)

    def _rejection_of_invalid_hello(self) -> tuple[int | None, str]:
        """Send a message that is not a ``hello``; return the brain's close code and its meaning.

        The code is ``None`` if the server answers with a message instead of closing the connection.
        Raises ``NetworkError`` if the upgrade or the exchange fails.
        """
        transport = self._transports.websocket()
        try:
            transport.upgrade()
            transport.send(lambda: _INVALID_HELLO)
            if transport.receive(self._timeout) is None:
                raise NetworkError(
                    f"the brain sent nothing within {self._timeout:g} s of the upgrade"
                )
        except AgentError as error:
            code = getattr(error, "code", None)
            if isinstance(code, int) and code >= close_codes.MIN_APPLICATION_CODE:
                return code, str(error)
            if isinstance(error, NetworkError):
                raise
            raise NetworkError(str(error), code=code) from None
        finally:
            transport.close()
        return None, ""

    def _signature_problem(self, error: RemoteError) -> ProbeResult:
        if self._skew is not None and abs(self._skew) > close_codes.MAX_CLOCK_SKEW:
            cause = f"the brain rejects the signature: the clocks differ by {abs(self._skew):.0f} s"
            fix = "correct this host's clock (NTP)"
        else:
            cause = "the brain rejects the signature: the key is not this project's"
            fix = (
                "copy Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE) again: "
                "each project has its own key, and the key can be rotated"
            )
        return failed("signature", cause, fix, status=error.code)


def brain_steps(probe: BrainProbe, *, websocket: bool = True) -> list[ProbeStep]:
    """Return the probes of the brain in the order in which they run.

    :param websocket: whether to include the WebSocket probe.
    """
    steps = [
        ProbeStep("http", "tls", probe.health),
        ProbeStep("clock", "http", probe.clock),
        ProbeStep("token", "http", probe.token),
    ]
    if websocket:
        steps.append(ProbeStep("websocket", "token", probe.websocket))
    return [*steps, ProbeStep("signature", "token", probe.signature)]


def unsent_hello() -> bytes:
    """Return a ``hello`` for the long-poll transport, which sends some fields as headers."""
    identity = frames.Identity(
        framework="bare",
        agent_version="",
        worker_id="",
        worker_pid=0,
        worker_started_at=datetime.now(UTC),
    )
    return frames.hello(identity)


def _health_problem(answer: Response) -> tuple[str, str]:
    """Return cause and fix for a response of the health route whose status is not 200."""
    status = answer.status
    if 300 <= status < 400:  # noqa: PLR2004 - HTTP
        location = printable(answer.headers.get("Location", "another address"))[:200]
        return f"the address redirects to {location}", "set Z4J_BRAIN_URL to the final address"
    if status == 404:  # noqa: PLR2004 - HTTP
        cause = "there is no health route at this address (HTTP 404)"
        return cause, "check Z4J_BRAIN_URL, including its path"
    if status in (401, 403, 407):
        cause = f"a proxy on the way requires a login (HTTP {status})"
        return cause, "check the proxy, and let the agent's routes pass without a login"
    if status in (502, 503, 504):
        cause = f"a proxy answers instead of the brain (HTTP {status})"
        return cause, "check that the brain behind the proxy is running"
    return f"the health route answers HTTP {status}", "check the brain's log"


def _is_brain(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["status"] == "ok")
    except (ValueError, KeyError, TypeError):
        return False
