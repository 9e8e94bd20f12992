"""What a close code or an HTTP status means, and how long to wait after it.

Sources: ``brain-contract`` 1.9, 3.5 and 8 (17) for the meaning, ``z4j-1.13-behaviour`` 2.5 for the schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import random

from z4j_bare.errors import (
    AgentError,
    AuthenticationRejectedError,
    IncompatibleError,
    NetworkError,
    PoisonRowError,
    RemoteError,
    RemoteProtocolError,
    SessionLimitError,
)

JITTER = 0.3


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """First and longest delay in seconds; each failure in a row doubles it, and up to 30 % are added by chance.

    Only a session that stood for ``steady`` seconds starts it over: many die as soon as they have been welcomed.
    """

    first: float
    longest: float
    steady: float = 30.0


BACKOFF_POLICIES = {
    "connection": BackoffPolicy(1, 30),
    "protocol": BackoffPolicy(1, 60),
    "auth": BackoffPolicy(10, 600),
    "incompatible": BackoffPolicy(120, 3600),
    # Of two processes that replace each other each one stands for as long as the other waits: steady is more than that.
    "crowded": BackoffPolicy(10, 600, steady=1800),
    # Brief, because the number of steps is bounded and no other row moves meanwhile.
    "search": BackoffPolicy(1, 4),
}

#: By exception, the first that fits; anything else is "connection".
_CLASSES: tuple[tuple[type[AgentError], str], ...] = (
    (AuthenticationRejectedError, "auth"),
    (IncompatibleError, "incompatible"),
    (RemoteProtocolError, "protocol"),
    (SessionLimitError, "crowded"),
    (PoisonRowError, "search"),
)

#: The brain knows three kinds of streaks; these classes count as another one's.
_REPORTED = {"incompatible": "protocol", "crowded": "connection", "search": "connection"}

_CREDENTIALS = "check Z4J_TOKEN (or Z4J_TOKEN_FILE): the brain does not know it, it was revoked, or its project is archived"
_INACTIVE = "this agent was revoked, or its project archived, in the brain: mint a new Z4J_TOKEN"
_ADDRESS = "this address is not in the brain's Z4J_AGENT_IP_ALLOWLIST"
_REPLACED = "another process said hello with this worker id (a copied or restored one?): this one goes on under a new id"
_FULL = (
    "the brain's limit is reached: 600 connections a minute and address, or 64 workers on one token"
)
_SIGNATURE = "check Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE): the brain refused a signature"

#: Close codes from here on are the brain's own; below, they are WebSocket's, and below 1000 HTTP's.
APPLICATION_CODES = 4000

#: The close code for a session whose place another process took.
SESSION_REPLACED = 4002

_CLOSES: dict[int, tuple[type[RemoteError | NetworkError], str]] = {
    1000: (NetworkError, "the brain closed the session"),
    1001: (NetworkError, "the brain is going away"),
    1009: (NetworkError, "a frame was too large for the brain"),
    1011: (NetworkError, "the brain failed on a frame, or lost its keepalive"),
    1012: (NetworkError, "the brain is restarting"),
    SESSION_REPLACED: (SessionLimitError, _REPLACED),
    4003: (AuthenticationRejectedError, _INACTIVE),
    4400: (RemoteProtocolError, "the brain could not read a frame"),
    4401: (AuthenticationRejectedError, _CREDENTIALS),
    4403: (AuthenticationRejectedError, _ADDRESS),
    4408: (NetworkError, "the brain saw no frame for too long: is the host blocked?"),
    4426: (
        IncompatibleError,
        "the brain speaks another protocol version: upgrade z4j-bare or the brain",
    ),
    4427: (
        IncompatibleError,
        "the brain refuses this agent version: upgrade z4j-bare or the brain",
    ),
    4429: (SessionLimitError, _FULL),
}

_HTTP: dict[int, tuple[type[RemoteError | NetworkError], str]] = {
    400: (NetworkError, "HTTP 400: is the host of Z4J_BRAIN_URL in the brain's Z4J_ALLOWED_HOSTS?"),
    401: (AuthenticationRejectedError, _CREDENTIALS),
    403: (AuthenticationRejectedError, f"the project is archived, or {_ADDRESS}"),
    404: (NetworkError, "HTTP 404: is Z4J_BRAIN_URL the brain's address, path included?"),
    409: (NetworkError, "HTTP 409: the brain does not know this session any more"),
    429: (SessionLimitError, "HTTP 429: more than 600 requests a minute from this address"),
    503: (NetworkError, "HTTP 503: the brain is starting, or has no room"),
}

#: What may have been one frame's fault: the brain could not read it, or somebody on the way did not like it.
_OF_A_FRAME = frozenset({1009, 1011, 4400, 4403, 400, 403, 409, 422})

#: What says that a signature was refused, in a session that had been welcomed.
_UNVERIFIED = (4403, 409)

#: Seconds between two clocks beyond which they are the reason for a refused signature; the brain allows 60.
SKEW = 50.0


def closed(code: int | None, reason: str = "") -> AgentError:
    """Return the error for a WebSocket close."""
    kind, text = _CLOSES.get(code or 0, (NetworkError, "the line was lost"))
    return kind(_with(text, reason), code=code)


def refused(status: int, reason: str = "", retry_after: float | None = None) -> AgentError:
    """Return the error for an HTTP answer that is not the one hoped for."""
    kind, text = _HTTP.get(status, (NetworkError, f"HTTP {status}"))
    return kind(_with(text, reason), code=status, retry_after=retry_after)


def explained(error: RemoteError, behind: float | None) -> RemoteError:
    """Return the error for a session that had been welcomed: there a refused signature means the clock or the key.

    :param behind: seconds by which the brain's clock was ahead of ours at the welcome, if it told.
    """
    if error.code not in _UNVERIFIED:
        return error
    if behind is not None and abs(behind) > SKEW:
        way = "behind" if behind > 0 else "ahead of"
        text = f"this host's clock is {abs(behind):.0f} s {way} the brain's, which allows 60: set it (NTP)"
    elif isinstance(error, AuthenticationRejectedError):
        known = "" if behind is None else f"; the clocks agree to {abs(behind):.0f} s"
        text = f"{_SIGNATURE}{known}"
    else:
        return error
    return type(error)(text, code=error.code, retry_after=error.retry_after)


def of_a_frame(error: AgentError) -> bool:
    """Whether ``error`` may be the answer to one frame, and come back with it for ever."""
    return getattr(error, "code", None) in _OF_A_FRAME


def failure_class(error: BaseException) -> str:
    """Return the name of the schedule for ``error``: a key of ``BACKOFF_POLICIES``."""
    return next((name for kind, name in _CLASSES if isinstance(error, kind)), "connection")


class Backoff:
    """Delays between attempts, one ladder per failure class.

    :param chance: returns a float in [0, 1); for tests.
    """

    def __init__(self, chance: Callable[[], float] = random) -> None:
        self._chance = chance
        #: Failures in a row since the last session, as the brain is told of them.
        self.streaks = self._none()
        self._rungs = dict.fromkeys(BACKOFF_POLICIES, 0)

    def next(self, error: BaseException) -> float:
        """Return the seconds to wait after ``error``; never less than what the server asked for."""
        kind = failure_class(error)
        schedule = BACKOFF_POLICIES[kind]
        delay = min(schedule.longest, schedule.first * 2.0 ** min(self._rungs[kind], 16))
        self._rungs[kind] += 1
        self.streaks[_REPORTED.get(kind, kind)] += 1
        wish = getattr(error, "retry_after", None) or 0.0
        return max(
            delay * (1 + JITTER * self._chance()),
            min(wish, BACKOFF_POLICIES["incompatible"].longest),
        )

    def welcomed(self) -> dict[str, int]:
        """Take note that a session stands; return the failures in a row that it ends."""
        ended, self.streaks = self.streaks, self._none()
        return ended

    def stood(self, seconds: float) -> None:
        """Start over wherever a session of ``seconds`` is long enough for that."""
        for kind, schedule in BACKOFF_POLICIES.items():
            if seconds >= schedule.steady:
                self._rungs[kind] = 0

    def _none(self) -> dict[str, int]:
        return {_REPORTED.get(kind, kind): 0 for kind in BACKOFF_POLICIES}


def _with(text: str, reason: str) -> str:
    return f"{text} ({reason})" if reason else text
