"""The brain itself: its health, its clock, the token, WebSocket, a signed frame.

Nothing here says ``hello``: that would overwrite what the brain knows of the agent's engines, and take the commands that
wait for it. The token is shown on the long-poll routes, whose probe claims no command, and what goes over WebSocket is
refused by its form, which comes after the token and before anything is stored (``brain-contract`` 1.2, 3.3).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

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
from z4j_bare.wire.session import Session, parse_hello_ack

if TYPE_CHECKING:
    from z4j_core.models import Config

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.settings import Settings
    from z4j_bare.transport.http import Response

#: Seconds of difference between the clocks that are worth a word; ``close_codes.MAX_CLOCK_SKEW`` is where they break signatures.
NOTABLE = 5.0

#: A message that is no ``hello``: the brain closes with this code, if it likes the token.
_NO_HELLO = b"{}"
_UNREADABLE = 4400

#: How the brain calls a project that is no more.
_ARCHIVED = ("archive", "inactive", "not active")


class BrainProbe:
    """Asks one brain, in an order in which each answer rests on the one before.

    Raises ``HostConfigurationError`` for settings that cannot work.
    """

    def __init__(
        self, config: Config, settings: Settings, backend: BaseConcurrency, timeout: float = 5.0
    ) -> None:
        wish = settings.transport if settings.transport != "auto" else config.transport
        self._config = config
        self._settings = settings
        self._backend = backend
        self._timeout = timeout
        self._routes = TransportFactory(
            str(config.brain_url),
            wish,
            lambda: read_token(config, settings),
            settings,
            backend,
            dev_mode=config.dev_mode,
        )
        self._date: str | None = None
        self._asked_at = 0.0
        self._skew: float | None = None
        self._line: Any = None
        self._welcome = b""

    def close(self) -> None:
        """Release what is open."""
        if self._line is not None:
            self._line.close()
        self._backend.close()

    def health(self) -> ProbeResult:
        """Ask the brain's health route."""
        began = self._backend.wall()
        try:
            answer = self._routes.health(self._timeout)
        except NetworkError as error:
            return failed(
                "http",
                str(error),
                "see whether a proxy or a firewall cuts the connection, and the brain's log",
            )
        self._asked_at, self._date = (began + self._backend.wall()) / 2, answer.headers.get("Date")
        if answer.status != 200:  # noqa: PLR2004 - HTTP
            return failed("http", *_unhealthy(answer), status=answer.status)
        if not _is_brain(answer.body):
            fix = "point Z4J_BRAIN_URL at the brain itself (a captive portal, another service?)"
            return failed(
                "http", "what answers the health route is no brain", fix, status=answer.status
            )
        return passed("http", "the brain is healthy", status=answer.status)

    def clock(self) -> ProbeResult:
        """Compare this host's clock with the brain's, as its health route told it; call ``health`` before."""
        try:
            stamp = parsedate_to_datetime(self._date or "").timestamp()
        except (ValueError, TypeError):
            return skipped("clock", "the brain's answer has no date")
        skew = stamp + 0.5 - self._asked_at  # the header has whole seconds
        self._skew = skew
        way = "behind" if skew > 0 else "ahead of"
        details = {"skew_seconds": round(skew, 1)}
        if abs(skew) > close_codes.MAX_CLOCK_SKEW:
            cause = f"this host's clock is {abs(skew):.0f} s {way} the brain's, which allows 60"
            return failed(
                "clock",
                cause,
                "set it: run NTP (chrony, systemd-timesyncd) on both hosts",
                **details,
            )
        if abs(skew) > NOTABLE:
            cause = f"this host's clock is {abs(skew):.0f} s {way} the brain's"
            return warned(
                "clock",
                cause,
                "run NTP (chrony, systemd-timesyncd); at 60 s signatures are refused",
                **details,
            )
        return passed("clock", f"agrees with the brain's to {max(1.0, abs(skew)):.0f} s", **details)

    def token(self) -> ProbeResult:
        """Show the token where no command is claimed and nothing is stored."""
        self._line = self._routes.longpoll()
        try:
            self._welcome = self._line.connect(silent_hello())
        except HostConfigurationError as error:
            return failed(
                "token",
                str(error),
                "have the file hold the token that the brain minted, readable by this user",
            )
        except AgentError as error:
            return self._token_refused(error)
        return passed("token", "the brain knows it, and its project is active")

    def websocket(self) -> ProbeResult:
        """Upgrade to WebSocket and have a message answered."""
        if self._routes.policy.preference == LONGPOLL:
            return skipped("websocket", "Z4J_TRANSPORT is longpoll")
        try:
            code, text = self._refused_message()
        except NetworkError as error:
            fix = "let Upgrade and Connection pass (nginx: proxy_http_version 1.1), or set Z4J_TRANSPORT=longpoll"
            return failed(
                "websocket", f"no WebSocket gets through: {error}", fix, status=error.code
            )
        if code == _UNREADABLE:
            return passed(
                "websocket", "gets through in both directions", remote_connection_verified=True
            )
        return failed(
            "websocket",
            f"the brain closed with {code}",
            text,
            code=code,
            remote_connection_verified=True,
        )

    def signature(self) -> ProbeResult:
        """Send an empty batch that is signed with the project's key; call ``token`` before."""
        try:
            session = Session(
                parse_hello_ack(self._welcome), read_key(self._config, self._settings)
            )
        except HostConfigurationError as error:
            return failed(
                "signature",
                str(error),
                "copy the hmac_secret that the brain showed when the agent was minted",
            )
        except RemoteError as error:
            return failed(
                "signature", str(error), "see whether Z4J_BRAIN_URL is the brain's own address"
            )
        identity = frames.frame_id("ev")
        try:
            self._line.send(
                lambda: session.sign(
                    "event_batch", identity, frames.event_batch([]), self._backend.wall()
                )
            )
        except AuthenticationRejectedError as error:
            return self._signature_refused(error)
        except (RemoteError, NetworkError, FrameTooLargeError) as error:
            return failed(
                "signature",
                f"the brain did not take a signed frame: {error}",
                "see the brain's log for why",
            )
        return passed(
            "signature",
            "a signed frame was verified and acknowledged",
            remote_authentication_verified=True,
        )

    def _token_refused(self, error: AgentError) -> ProbeResult:
        code, text = getattr(error, "code", None), str(error)
        if code == 403 and any(word in text.partition("(")[2].lower() for word in _ARCHIVED):  # noqa: PLR2004 - HTTP
            cause = f"the project {self._config.project_id} is archived"
            return failed(
                "token",
                cause,
                "restore it in the brain, or mint an agent in another project",
                status=code,
            )
        if code == 401:  # noqa: PLR2004 - HTTP
            cause = "the brain does not know the token, or it was revoked"
            return failed(
                "token",
                cause,
                "copy Z4J_TOKEN (or Z4J_TOKEN_FILE) anew, or mint another agent",
                status=code,
            )
        if isinstance(error, AuthenticationRejectedError):
            return failed("token", "the brain turned this agent away", text, status=code)
        if self._routes.policy.preference == WS:
            fix = "nothing for WebSocket, but long-poll and this check need these routes"
            return warned(
                "token", f"the agent's HTTP routes do not answer: {text}", fix, status=code
            )
        return failed("token", "the agent's HTTP routes do not answer", text, status=code)

    def _refused_message(self) -> tuple[int | None, str]:
        """Return the code with which the brain closes on a message that is no ``hello``, and what it means."""
        line = self._routes.websocket()
        try:
            line.upgrade()
            line.send(lambda: _NO_HELLO)
            if line.receive(self._timeout) is None:
                raise NetworkError(f"after the upgrade the brain is silent for {self._timeout:g} s")
        except AgentError as error:
            code = getattr(error, "code", None)
            if not isinstance(code, int) or code < close_codes.APPLICATION_CODES:
                raise (
                    error
                    if isinstance(error, NetworkError)
                    else NetworkError(str(error), code=code)
                ) from None
            return code, str(error)
        finally:
            line.close()
        return None, "it answered what it should have refused: is this the brain?"

    def _signature_refused(self, error: RemoteError) -> ProbeResult:
        if self._skew is not None and abs(self._skew) > close_codes.MAX_CLOCK_SKEW:
            cause = (
                f"the brain refuses the signature, for the clocks differ by {abs(self._skew):.0f} s"
            )
            return failed("signature", cause, "set this host's clock (NTP)", status=error.code)
        fix = "copy Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE) anew: each project has its own, and it can be rotated"
        return failed(
            "signature",
            "the brain refuses the signature: the key is another one",
            fix,
            status=error.code,
        )


def sequence(
    remote: BrainProbe, *, websocket: bool = True
) -> list[tuple[str, str, Callable[[], ProbeResult]]]:
    """Return ``(name, what it rests on, probe)`` in order; a probe whose ground failed is not worth making."""
    probes = [
        ("http", "tls", remote.health),
        ("clock", "http", remote.clock),
        ("token", "http", remote.token),
    ]
    if websocket:
        probes.append(("websocket", "token", remote.websocket))
    return [*probes, ("signature", "token", remote.signature)]


def silent_hello() -> bytes:
    """Return a ``hello`` for the long-poll transport, which reads the features out of it and does not send it."""
    identity = frames.Identity(
        framework="bare",
        agent_version="",
        worker_id="",
        worker_pid=0,
        worker_started_at=datetime.now(UTC),
    )
    return frames.hello(identity)


def _unhealthy(answer: Response) -> tuple[str, str]:
    status = answer.status
    if 300 <= status < 400:  # noqa: PLR2004 - HTTP
        place = printable(answer.headers.get("Location", "elsewhere"))[:200]
        return f"the address redirects to {place}", "set Z4J_BRAIN_URL to where it leads"
    if status == 404:  # noqa: PLR2004 - HTTP
        return (
            "there is no health route (HTTP 404)",
            "check Z4J_BRAIN_URL, path included: is it the brain's?",
        )
    if status in (401, 403, 407):
        return (
            f"something on the way wants a login (HTTP {status})",
            "check the proxy, and let the agent's routes pass",
        )
    if status in (502, 503, 504):
        return (
            f"a proxy answers in the brain's place (HTTP {status})",
            "see whether the brain behind it runs",
        )
    return f"the health route answers HTTP {status}", "look at the brain's log"


def _is_brain(body: bytes) -> bool:
    try:
        return bool(json.loads(body)["status"] == "ok")
    except (ValueError, KeyError, TypeError):
        return False
