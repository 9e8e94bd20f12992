"""The long-poll transport: HTTP requests for networks that block WebSocket."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any

from z4j_core.version import PROTOCOL_VERSION
from zope.interface import implementer

from z4j_bare.errors import (
    AgentError,
    AuthenticationRejectedError,
    FrameTooLargeError,
    NetworkError,
    RemoteProtocolError,
)
from z4j_bare.interfaces import ITransport
from z4j_bare.transport.error_text import printable
from z4j_bare.wire import close_codes
from z4j_bare.wire.canonical import canonical

if TYPE_CHECKING:
    import ssl

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.concurrency.base import Task
    from z4j_bare.transport.http import Client, Response

logger = logging.getLogger("z4j.runtime.transport.longpoll")

#: Timeout in seconds of the first request of a session.
PROBE_TIMEOUT = 10.0

#: Timeout of an upload in seconds.
POST_TIMEOUT = 15.0

#: Duration of a poll in seconds. The brain responds earlier if it has a command.
POLL_WAIT = 30

#: Minimum duration of a poll in seconds, if a proxy ends longer polls early.
MIN_POLL_WAIT = 5

#: Seconds by which the timeout of a poll exceeds its duration.
POLL_GRACE = 10.0

#: Minimum seconds from the start of one poll to the next.
MIN_POLL_INTERVAL = 0.25

#: Minimum seconds from the start of a poll without commands to the next poll.
#: This limits the number of requests if a cache answers polls at once.
EMPTY_POLL_INTERVAL = 1.0

#: Maximum number of commands in the response to a poll.
MAX_COMMANDS = 50

#: Maximum number of uploads without a delay.
UPLOAD_BURST = 30

#: Maximum uploads per second after a burst.
#: The brain allows 600 requests a minute from one IP address, including all polls.
UPLOAD_RATE = 5.0

#: Initial limit of a request body in bytes. Each rejection halves the limit.
BODY_LIMIT_INITIAL = 128 * 1024

#: The brain's default limit of a request body in bytes.
BODY_LIMIT_DEFAULT = 8 * 1024

#: Minimum limit of a request body in bytes.
BODY_LIMIT_MIN = 1024

#: Bytes that a request body adds to a frame.
WRAPPER_BYTES = len(b'{"frames":[""]}')

#: Seconds between two checks whether all commands of a drained session have been received.
DRAIN_POLL_INTERVAL = 0.05

#: The capability of engines that support retry commands. A request header names these engines.
RETRY_CONTRACT = "retry_by_reference_v1"

_NOT_A_BRAIN_HINT = "is Z4J_BRAIN_URL the brain's URL, or does a proxy respond instead?"


@dataclass(slots=True)
class LearnedLimits:
    """Limits of the brain and the network, learned in one session and used in later sessions."""

    body_limit: int = BODY_LIMIT_INITIAL
    #: Bytes of the largest request body that was accepted.
    body_proven: int = 0
    #: Duration of a poll in seconds.
    wait: int = POLL_WAIT
    agent_id: str = ""
    project_id: str = ""

    def reject_body(self, size: int) -> None:
        """Halve the limit until it is below ``size`` bytes, but not below ``BODY_LIMIT_MIN``."""
        while self.body_limit >= size and self.body_limit > BODY_LIMIT_MIN:
            self.body_limit //= 2

    def shorten_polls(self) -> None:
        """Halve the duration of a poll, because a proxy has ended a poll early."""
        self.wait = max(MIN_POLL_WAIT, self.wait // 2)
        logger.debug("z4j: a proxy ends long polls early; new duration: %d s", self.wait)


@dataclass(slots=True)
class TokenBucket:
    """A token bucket that limits the rate of uploads. The caller passes the time."""

    tokens: float = UPLOAD_BURST
    updated_at: float = 0.0

    def take(self, now: float) -> float:
        """Take one token; return the seconds to wait before the upload.

        :param now: monotonic time in seconds.
        """
        refilled = self.tokens + (now - self.updated_at) * UPLOAD_RATE
        self.tokens = min(float(UPLOAD_BURST), refilled) - 1
        self.updated_at = now
        return max(0.0, -self.tokens / UPLOAD_RATE)


class _Poller:
    """Polls for command frames in a task, and returns the frames in the order of arrival."""

    def __init__(self, client: Client, backend: BaseConcurrency, limits: LearnedLimits) -> None:
        self.aborted = False
        self._client = client
        self._backend = backend
        self._limits = limits
        #: Set when there is a frame to receive or an error to raise.
        self._ready = backend.event()
        self._stopped = backend.event()
        self._frames: deque[bytes] = deque()
        self._error: AgentError | None = None
        self._draining = False
        self._task: Task | None = None

    def receive(self, timeout: float) -> bytes | None:
        """Return the next frame, or ``None`` after ``timeout`` seconds.

        The first call starts the polling task.
        """
        if self._task is None and not self.aborted:
            self._task = self._backend.spawn(self._run, name="z4j-poll")
        self._ready.clear()
        if not self._frames and self._error is None and not self.aborted:
            self._backend.wait(self._ready, timeout)
        if self._frames:
            return self._frames.popleft()
        if self.aborted:
            raise NetworkError("the connection is closed")
        if self._error is not None:
            raise self._error
        return None

    def drain(self) -> None:
        """Stop polling after the current poll; wait until its frames have been received."""
        self._draining = True
        if self._task is not None:
            self._backend.wait(self._stopped, POLL_WAIT + POLL_GRACE)
        while self._frames and not self.aborted:
            self._backend.sleep(DRAIN_POLL_INTERVAL)

    def abort(self) -> None:
        """Abort the current poll and wake the task that waits in ``receive``."""
        self._client.abort()
        self._ready.set()

    def close(self) -> None:
        """Release the connection, unless the polling task runs and will release it."""
        if self._task is None:
            self._client.close()

    def join(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for the polling task; return whether it has ended."""
        return self._task is None or self._task.join(timeout)

    def _run(self) -> None:
        try:
            while not self._draining and not self.aborted:
                started = self._backend.now()
                frames = self._poll(started)
                self._frames.extend(frames)
                self._ready.set()
                interval = MIN_POLL_INTERVAL if frames else EMPTY_POLL_INTERVAL
                self._backend.sleep(max(0.0, started + interval - self._backend.now()))
        except AgentError as error:
            self._error = error
        finally:
            if not self._backend.forked():
                if self._error is None and not self._draining:
                    self._error = NetworkError("polling has ended")
                self._stopped.set()
                self._ready.set()
                self._client.close()

    def _poll(self, started: float) -> list[bytes]:
        wait = self._limits.wait
        try:
            response = self._client.request(
                "GET",
                f"/agent/commands?wait={wait}&max_frames={MAX_COMMANDS}",
                timeout=wait + POLL_GRACE,
            )
        except NetworkError:
            if self._backend.now() - started > wait / 2 and not self.aborted:
                self._limits.shorten_polls()
            raise
        if response.status in (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT):
            self._limits.shorten_polls()
        if response.status != HTTPStatus.OK:
            raise _error_for(response)
        frames = _json_object(response.body).get("frames")
        if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
            raise RemoteProtocolError("the response to a poll contains no list of frames")
        return [frame.encode(errors="replace") for frame in frames]


@implementer(ITransport)
class LongPollTransport:
    """One long-poll session. It uploads one frame at a time, and polls in a separate task.

    :param url: from :func:`~z4j_bare.transport.endpoint.longpoll_url`.
    :param token: returns the token. Called at every connect, because a token file can be rotated.
    """

    name = "longpoll"
    synchronous_acks = True

    def __init__(
        self,
        url: str,
        token: Callable[[], str],
        backend: BaseConcurrency,
        limits: LearnedLimits,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._url = url
        self._token = token
        self._backend = backend
        self._limits = limits
        self._tls = tls
        self._send_lock = backend.lock()
        self._bucket = TokenBucket(updated_at=backend.now())
        self._uploads: Client | None = None
        self._poller: _Poller | None = None
        self._upload_accepted = False
        self._aborted = False

    def connect(self, hello: bytes) -> bytes:
        """Send a first request with a new nonce; return a ``hello_ack`` made from the response.

        Some fields of ``hello`` are sent as request headers, because long-poll has no ``hello``.
        """
        payload = json.loads(hello)["payload"]
        nonce = token_urlsafe(16)
        contracts = [
            name for name, tokens in payload["capabilities"].items() if RETRY_CONTRACT in tokens
        ]
        headers = {
            "Authorization": f"Bearer {self._token()}",
            "X-Z4J-Session-Nonce": nonce,
            "X-Z4J-Retry-Contracts": ",".join(f"{name}=1" for name in sorted(contracts)),
        }
        http = self._backend.import_module("z4j_bare.transport.http")
        self._uploads = uploads = http.Client(self._url, headers, self._backend, self._tls)
        polls = http.Client(self._url, headers, self._backend, self._tls)
        polls.share_cookies(uploads)
        self._poller = _Poller(polls, self._backend, self._limits)
        if self._aborted:
            raise NetworkError("the connection is closed")
        features = {"X-Z4J-Runtime-Features": ",".join(payload["runtime_features"])}
        response = uploads.request(
            "GET", "/agent/commands?wait=0&max_frames=0", timeout=PROBE_TIMEOUT, headers=features
        )
        if response.status != HTTPStatus.OK:
            raise _error_for(response)
        return self._hello_ack(nonce, response)

    def send(self, build: Callable[[], bytes]) -> int:
        """Sign and upload one frame, and wait until the brain has stored it; see ``ITransport``."""
        with self._send_lock:
            if self._uploads is None or self._aborted:
                raise NetworkError("the connection is closed")
            client = self._uploads
            self._backend.sleep(self._bucket.take(self._backend.now()))
            frame = build()
            body = b'{"frames":[%b]}' % json.dumps(frame.decode(), ensure_ascii=False).encode()
            if len(body) > self._limits.body_limit:
                raise FrameTooLargeError(len(body), self._limits.body_limit)
            self._upload(client, body)
        return len(frame)

    def receive(self, timeout: float) -> bytes | None:
        """Return the next frame of the polls; see ``ITransport``."""
        if self._poller is None:
            raise NetworkError("the connection is closed")
        return self._poller.receive(timeout)

    def drain(self) -> None:
        """Stop polling after the current poll; wait until its commands have been received.

        The poll is not aborted, because commands in its response would be lost.
        """
        if self._poller is not None:
            self._poller.drain()

    def abort(self) -> None:
        """Abort both connections and wake the receiving task.

        Any task may call this method. Idempotent.
        """
        self._aborted = True
        if self._poller is not None:
            self._poller.aborted = True
        if self._backend.forked():
            return
        if self._uploads is not None:
            self._uploads.abort()
        if self._poller is not None:
            self._poller.abort()

    def close(self) -> None:
        """Release both connections. Long-poll has no message that ends a session."""
        self.abort()
        if self._uploads is not None:
            self._uploads.close()
        if self._poller is not None:
            self._poller.close()

    def _hello_ack(self, nonce: str, response: Response) -> bytes:
        limits = self._limits
        limits.agent_id = response.headers.get("X-Z4J-Agent-Id", limits.agent_id)
        limits.project_id = response.headers.get("X-Z4J-Project-Id", limits.project_id)
        if not limits.agent_id or not limits.project_id:
            raise RemoteProtocolError(f"the response lacks X-Z4J-Agent-Id: {_NOT_A_BRAIN_HINT}")
        payload = {
            "protocol_version": PROTOCOL_VERSION,
            "brain_version": "",
            "agent_id": limits.agent_id,
            "project_id": limits.project_id,
            "session_id": nonce,
            "heartbeat_interval_seconds": 10,
            "max_frame_size_bytes": max(BODY_LIMIT_MIN, limits.body_limit - WRAPPER_BYTES),
        }
        return canonical(
            {
                "v": 2,
                "type": "hello_ack",
                "id": "hack_longpoll",
                "ts": _date(response),
                "payload": payload,
            }
        )

    def _upload(self, client: Client, body: bytes) -> None:
        limits = self._limits
        headers = {"Content-Type": "application/json"}
        try:
            response = client.request(
                "POST", "/agent/events", timeout=POST_TIMEOUT, body=body, headers=headers
            )
        except NetworkError:
            # A proxy that rejects a large body may close the connection before its response is
            # read. Therefore a lost connection may count as a rejection of the body.
            if len(body) > max(limits.body_proven, BODY_LIMIT_DEFAULT) and not self._aborted:
                limits.reject_body(len(body))
            raise
        if response.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            limits.reject_body(len(body))
            if limits.body_limit < len(body):
                raise FrameTooLargeError(len(body), limits.body_limit)
        if response.status != HTTPStatus.OK:
            raise _error_for(response, first_upload=not self._upload_accepted)
        self._upload_accepted = True
        limits.body_proven = max(limits.body_proven, len(body))
        outcome = _json_object(response.body)
        if code := outcome.get("error_code"):
            raise RemoteProtocolError(
                f"the brain rejects a frame ({_quoted(code)})",
                code=HTTPStatus.UNPROCESSABLE_ENTITY.value,
            )
        if outcome.get("accepted") != 1:
            raise NetworkError(
                f"the brain could not store a frame ({_quoted(outcome.get('errors'))})"
            )


def _error_for(response: Response, *, first_upload: bool = False) -> AgentError:
    reason = _reason(response)
    if response.status == HTTPStatus.CONFLICT and first_upload:
        # With status 409 the brain rejects a nonce or a signature.
        # The brain has accepted the nonce in the first request, so it rejects the signature.
        text = (
            "check Z4J_HMAC_SECRET and this host's clock (the brain allows 60 s): "
            f"the brain rejected a signature ({reason})"
        )
        return AuthenticationRejectedError(text, code=HTTPStatus.CONFLICT.value)
    return close_codes.error_for_http_status(response.status, reason, response.retry_after)


def _reason(response: Response) -> str:
    try:
        body = _json_object(response.body)
    except RemoteProtocolError:
        return ""
    return _quoted(body.get("detail") or body.get("message") or body.get("error") or "")


def _quoted(value: object) -> str:
    """Return a value from the brain as text for an error message."""
    return printable(str(value))[:200]


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"the response is not a JSON object: {_NOT_A_BRAIN_HINT}")
    return value


def _date(response: Response) -> str | None:
    try:
        return parsedate_to_datetime(response.headers["Date"]).isoformat()
    except (KeyError, ValueError, TypeError):
        return None
