"""The brain over plain HTTP requests, for networks that let no WebSocket through (``brain-contract`` section 3)."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
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
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.transport.http import Answer, Client

logger = logging.getLogger("z4j.runtime.longpoll")

#: Seconds for the probe and for one upload to be answered.
PROBE_TIMEOUT = 10.0
POST_TIMEOUT = 15.0

#: Seconds that the brain holds a poll open: at most, and at least where something on the way cuts longer ones. The answer
#: gets ``GRACE`` more.
WAIT = 30
SHORTEST_WAIT = 5
GRACE = 10.0

#: Seconds between two polls at least, and after one that came back empty before its time.
POLL_GAP = 0.25
EMPTY_GAP = 1.0

#: Commands taken at once.
MAX_FRAMES = 50

#: Uploads that may follow each other at once, and then a second: the brain allows 600 requests a minute for all that one
#: address does, polls and other workers included.
BURST = 30
RATE = 5.0

#: Bytes of a request body: what we try first, and what we never go below. The brain's default limit is 8,192, one of the
#: halves.
BODY_FIRST = 128 * 1024
BODY_USUAL = 8 * 1024
BODY_LEAST = 1024

#: What is around a frame in a body.
WRAP = len(b'{"frames":[""]}')

#: The capability that entitles an engine to retry commands, and the header that says so.
RETRY_CONTRACT = "retry_by_reference_v1"

_STRANGER = "is Z4J_BRAIN_URL the brain's address, or does a proxy answer in its place?"

_SESSION_OVER = 409
_TOO_LARGE = 413
_UNPROCESSABLE = 422


@dataclass(slots=True)
class LearnedLimits:
    """What one session learns for all later ones of this process."""

    body_limit: int = BODY_FIRST
    #: The largest body that got through.
    body_proven: int = 0
    wait: int = WAIT
    agent_id: str = ""
    project_id: str = ""

    def too_large(self, size: int) -> None:
        """Halve the limit until a body of ``size`` is over it."""
        while self.body_limit >= size and self.body_limit > BODY_LEAST:
            self.body_limit //= 2


@dataclass(slots=True)
class TokenBucket:
    """A bucket of permits for uploads; without a clock."""

    permits: float = BURST
    at: float = 0.0

    def delay(self, now: float) -> float:
        """Take one permit and return the seconds to wait before using it."""
        self.permits = min(float(BURST), self.permits + (now - self.at) * RATE) - 1
        self.at = now
        return max(0.0, -self.permits / RATE)


@dataclass(slots=True)
class _Inbox:
    """What the polling task leaves for the reader."""

    news: Any
    frames: deque[bytes] = field(default_factory=deque)
    failure: AgentError | None = None


@implementer(ITransport)
class LongPollTransport:
    """One long-poll session: uploads one at a time, and one poll beside them in a task of its own.

    :param url: from :func:`~z4j_bare.transport.endpoint.longpoll_url`.
    :param token: called at every connect, so that a rotated token file is noticed.
    :param known: shared by all sessions.
    :param tls: an ``ssl.SSLContext`` for an ``https`` address.
    """

    name = "longpoll"
    confirms = True

    def __init__(
        self,
        url: str,
        token: Callable[[], str],
        backend: BaseConcurrency,
        known: LearnedLimits,
        tls: Any = None,
    ) -> None:
        self._url = url
        self._token = token
        self._backend = backend
        self._known = known
        self._tls = tls
        self._order = backend.lock()
        self._pace = TokenBucket(at=backend.now())
        self._inbox = _Inbox(backend.event())
        self._over = backend.event()
        self._uploads: Client | None = None
        self._polls: Client | None = None
        self._task: Any = None
        self._verified = False
        self._resting = False
        self._aborted = False

    def connect(self, hello: bytes) -> bytes:
        """Probe with a fresh nonce; return a ``hello_ack`` made from the answer's headers, since this road has none."""
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
        self._polls = http.Client(self._url, headers, self._backend, self._tls)
        self._polls.share_cookies(uploads)
        if self._aborted:
            raise NetworkError("the line is closed")
        features = {"X-Z4J-Runtime-Features": ",".join(payload["runtime_features"])}
        answer = uploads.call(
            "GET", "/agent/commands?wait=0&max_frames=0", timeout=PROBE_TIMEOUT, headers=features
        )
        if answer.status != 200:  # noqa: PLR2004 - HTTP
            raise _refusal(answer)
        return self._welcome(nonce, answer)

    def send(self, build: Callable[[], bytes]) -> int:
        """Sign and upload one frame; when this returns, the brain has it."""
        with self._order:
            client = self._open()
            self._backend.sleep(self._pace.delay(self._backend.now()))
            frame = build()
            body = b'{"frames":[%b]}' % json.dumps(frame.decode(), ensure_ascii=False).encode()
            if len(body) > self._known.body_limit:
                raise FrameTooLargeError(len(body), self._known.body_limit)
            self._upload(client, body)
        return len(frame)

    def receive(self, timeout: float) -> bytes | None:
        """Return the next frame of what was polled, in the brain's order."""
        if self._task is None and not self._aborted:
            self._task = self._backend.spawn(self._poll, name="z4j-poll")
        inbox = self._inbox
        inbox.news.clear()
        if not inbox.frames and inbox.failure is None and not self._aborted:
            self._backend.wait(inbox.news, timeout)
        if inbox.frames:
            return inbox.frames.popleft()
        if self._aborted:
            raise NetworkError("the line is closed")
        if inbox.failure is not None:
            raise inbox.failure
        return None

    def drain(self) -> None:
        """Poll no more, and wait until the poll that is out has come back and all it brought has been received.

        A poll that is cut off may take a command along that nobody will ever run.
        """
        self._resting = True
        if self._task is not None:
            self._backend.wait(self._over, WAIT + GRACE)
        while self._inbox.frames and not self._aborted:
            self._backend.sleep(0.05)

    def abort(self) -> None:
        """Break both lines from any task and wake the reader."""
        self._aborted = True
        if self._backend.forked():
            return
        for client in (self._uploads, self._polls):
            if client is not None:
                client.abort()
        self._inbox.news.set()

    def close(self) -> None:
        """Release the lines; there is nothing to say goodbye with."""
        self.abort()
        if self._uploads is not None:
            self._uploads.close()
        if self._polls is not None and self._task is None:
            self._polls.close()  # otherwise the polling task does, at its end

    def _open(self) -> Client:
        if self._uploads is None or self._aborted:
            raise NetworkError("the line is closed")
        return self._uploads

    def _welcome(self, nonce: str, answer: Answer) -> bytes:
        known = self._known
        known.agent_id = answer.headers.get("X-Z4J-Agent-Id", known.agent_id)
        known.project_id = answer.headers.get("X-Z4J-Project-Id", known.project_id)
        if not known.agent_id or not known.project_id:
            raise RemoteProtocolError(f"the answer lacks X-Z4J-Agent-Id: {_STRANGER}")
        ack = {
            "protocol_version": PROTOCOL_VERSION,
            "brain_version": "",
            "agent_id": known.agent_id,
            "project_id": known.project_id,
            "session_id": nonce,
            "heartbeat_interval_seconds": 10,
            "max_frame_size_bytes": max(BODY_LEAST, known.body_limit - WRAP),
        }
        return canonical(
            {
                "v": 2,
                "type": "hello_ack",
                "id": "hack_longpoll",
                "ts": _date(answer),
                "payload": ack,
            }
        )

    def _upload(self, client: Client, body: bytes) -> None:
        known = self._known
        headers = {"Content-Type": "application/json"}
        try:
            answer = client.call(
                "POST", "/agent/events", timeout=POST_TIMEOUT, body=body, headers=headers
            )
        except NetworkError:
            # Who refuses a body by its size may hang up before the answer can be read.
            if len(body) > max(known.body_proven, BODY_USUAL) and not self._aborted:
                known.too_large(len(body))
            raise
        if answer.status == _TOO_LARGE:
            known.too_large(len(body))
            if known.body_limit < len(body):
                raise FrameTooLargeError(len(body), known.body_limit)
        if answer.status != 200:  # noqa: PLR2004 - HTTP
            raise _refusal(answer, first=not self._verified)
        self._verified = True
        known.body_proven = max(known.body_proven, len(body))
        outcome = _object(answer.body)
        if code := outcome.get("error_code"):
            raise RemoteProtocolError(
                f"the brain does not take a frame ({_quoted(code)})", code=_UNPROCESSABLE
            )
        if outcome.get("accepted") != 1:
            raise NetworkError(
                f"the brain could not store a frame just now ({_quoted(outcome.get('errors'))})"
            )

    def _poll(self) -> None:
        client = self._polls
        inbox = self._inbox
        try:
            while client is not None and not self._resting and not self._aborted:
                began = self._backend.now()
                frames = self._ask(client, began)
                inbox.frames.extend(frames)
                inbox.news.set()
                gap = POLL_GAP if frames else EMPTY_GAP
                self._backend.sleep(max(0.0, began + gap - self._backend.now()))
        except AgentError as error:
            inbox.failure = error
        finally:
            if not self._backend.forked():
                if inbox.failure is None and not self._resting:
                    inbox.failure = NetworkError("polling has ended")
                self._over.set()
                inbox.news.set()
                if client is not None:
                    client.close()

    def _ask(self, client: Client, began: float) -> list[bytes]:
        wait = self._known.wait
        try:
            answer = client.call(
                "GET", f"/agent/commands?wait={wait}&max_frames={MAX_FRAMES}", timeout=wait + GRACE
            )
        except NetworkError:
            if self._backend.now() - began > wait / 2 and not self._aborted:
                self._shorten()
            raise
        if answer.status in (502, 504):
            self._shorten()
        if answer.status != 200:  # noqa: PLR2004 - HTTP
            raise _refusal(answer)
        frames = _object(answer.body).get("frames")
        if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
            raise RemoteProtocolError("the answer to a poll holds no frames")
        return [frame.encode(errors="replace") for frame in frames]

    def _shorten(self) -> None:
        self._known.wait = max(SHORTEST_WAIT, self._known.wait // 2)
        logger.debug(
            "z4j: something cuts long polls off; they last %d s from now on", self._known.wait
        )


def _refusal(answer: Answer, *, first: bool = False) -> AgentError:
    reason = _reason(answer)
    if answer.status == _SESSION_OVER and first:
        # The nonce is new and the probe went well, so it is the signature itself that the brain did not like.
        text = f"check Z4J_HMAC_SECRET and this host's clock (the brain allows 60 s): a signature was refused ({reason})"
        return AuthenticationRejectedError(text, code=_SESSION_OVER)
    return close_codes.refused(answer.status, reason, answer.retry_after)


def _reason(answer: Answer) -> str:
    try:
        said = _object(answer.body)
    except RemoteProtocolError:
        return ""
    return _quoted(said.get("detail") or said.get("message") or said.get("error") or "")


def _quoted(said: object) -> str:
    """Return what the brain said, fit for a message of ours."""
    return printable(str(said))[:200]


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"the answer is no JSON object: {_STRANGER}")
    return value


def _date(answer: Answer) -> str | None:
    try:
        return parsedate_to_datetime(answer.headers["Date"]).isoformat()
    except (KeyError, ValueError, TypeError):
        return None
