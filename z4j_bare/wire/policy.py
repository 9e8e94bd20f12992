"""What a close code or an HTTP status means, and how long to wait after it.

Sources: ``brain-contract`` 1.9, 3.5 and 8 (17) for the meaning, ``z4j-1.13-behaviour`` 2.5 for the four schedules.
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
    RemoteError,
    RemoteProtocolError,
)

JITTER = 0.3


@dataclass(frozen=True, slots=True)
class Schedule:
    """First and longest delay in seconds; each failure in a row doubles it, and up to 30 % are added by chance."""

    first: float
    longest: float


SCHEDULES = {
    "connection": Schedule(1, 30),
    "protocol": Schedule(1, 60),
    "auth": Schedule(10, 600),
    "incompatible": Schedule(120, 3600),
}

_CREDENTIALS = "check Z4J_TOKEN (or Z4J_TOKEN_FILE): the brain does not know it, it was revoked, or its project is archived"
_SIGNATURE = (
    "check Z4J_HMAC_SECRET and this host's clock (the brain allows 60 s): a signature was refused, or this address is not "
    "in the brain's Z4J_AGENT_IP_ALLOWLIST"
)

_REFUSALS: dict[int, tuple[type[RemoteError], str]] = {
    4401: (AuthenticationRejectedError, _CREDENTIALS),
    4003: (AuthenticationRejectedError, "this agent was revoked, or its project archived, in the brain: mint a new token"),
    4403: (AuthenticationRejectedError, _SIGNATURE),
    4400: (RemoteProtocolError, "the brain could not read a frame"),
    4426: (IncompatibleError, "the brain speaks another protocol version: upgrade z4j-bare or the brain"),
    4427: (IncompatibleError, "the brain refuses this agent version: upgrade z4j-bare or the brain"),
}

_LOSSES = {
    1000: "the brain closed the session",
    1001: "the brain is going away",
    1009: "a frame was too large for the brain",
    1011: "the brain failed on a frame, or lost its keepalive",
    1012: "the brain is restarting",
    4002: "another process took this worker's slot",
    4408: "the brain saw no frame for too long",
    4429: "the brain's connection limit is reached (600 a minute and address, or 64 workers on one token)",
}

_HTTP = {
    401: (AuthenticationRejectedError, _CREDENTIALS),
    403: (AuthenticationRejectedError, "the project is archived, or this address is not allowed"),
}


def closed(code: int | None, reason: str = "") -> AgentError:
    """Return the error for a WebSocket close."""
    if code in _REFUSALS:
        kind, text = _REFUSALS[code]
        return kind(_with(text, reason), code=code)
    return NetworkError(_with(_LOSSES.get(code or 0, "the line was lost"), reason), code=code)


def refused(status: int, reason: str = "", retry_after: float | None = None) -> AgentError:
    """Return the error for an HTTP answer that is not the one hoped for."""
    if status in _HTTP:
        kind, text = _HTTP[status]
        return kind(_with(text, reason), code=status, retry_after=retry_after)
    return NetworkError(_with(f"HTTP {status}", reason), code=status, retry_after=retry_after)


def failure_class(error: BaseException) -> str:
    """Return the name of the schedule for ``error``: a key of ``SCHEDULES``."""
    if isinstance(error, AuthenticationRejectedError):
        return "auth"
    if isinstance(error, IncompatibleError):
        return "incompatible"
    if isinstance(error, RemoteProtocolError):
        return "protocol"
    return "connection"


class Backoff:
    """Delays between attempts, one ladder per failure class.

    :param chance: returns a float in [0, 1); for tests.
    """

    def __init__(self, chance: Callable[[], float] = random) -> None:
        self._chance = chance
        self.streaks = dict.fromkeys(SCHEDULES, 0)

    def next(self, error: BaseException) -> float:
        """Return the seconds to wait after ``error``; never less than what the server asked for."""
        kind = failure_class(error)
        schedule = SCHEDULES[kind]
        delay = min(schedule.longest, schedule.first * 2.0 ** min(self.streaks[kind], 16))
        self.streaks[kind] += 1
        wish = getattr(error, "retry_after", None) or 0.0
        return max(delay * (1 + JITTER * self._chance()), min(wish, SCHEDULES["incompatible"].longest))

    def reset(self) -> None:
        """Start over, because a session stands."""
        self.streaks = dict.fromkeys(SCHEDULES, 0)


def _with(text: str, reason: str) -> str:
    return f"{text} ({reason})" if reason else text
