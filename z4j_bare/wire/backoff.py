"""Exponential back-off, and the reconnect delays of each failure class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import random as _uniform

from z4j_bare.errors import (
    AgentError,
    AuthenticationRejectedError,
    IncompatibleError,
    PoisonRowError,
    RemoteProtocolError,
    SessionLimitError,
)

#: Maximum random addition to a reconnect delay, relative to the delay.
#: Without the addition, all workers would reconnect at the same time.
JITTER = 0.3


class Backoff:
    """Delays that grow from ``initial`` to ``maximum`` seconds, by ``factor`` at each step.

    :param jitter: maximum random addition of ``next``, relative to the delay.
    :param random: returns a float in [0, 1).
    """

    __slots__ = ("_factor", "_initial", "_jitter", "_maximum", "_random", "delay")

    def __init__(
        self,
        initial: float,
        maximum: float,
        *,
        factor: float = 2.0,
        jitter: float = 0.0,
        random: Callable[[], float] = _uniform,
    ) -> None:
        #: The next delay in seconds, without jitter.
        self.delay = min(initial, maximum)
        self._initial = self.delay
        self._maximum = maximum
        self._factor = factor
        self._jitter = jitter
        self._random = random

    def next(self) -> float:
        """Return the next delay in seconds with jitter, and increase ``delay``."""
        delay = self.delay
        self.increase()
        return delay * (1 + self._jitter * self._random()) if self._jitter else delay

    def increase(self) -> None:
        """Multiply ``delay`` by ``factor``, up to the maximum."""
        self.delay = min(self._maximum, self.delay * self._factor)

    def reset(self) -> None:
        """Set ``delay`` to its initial value."""
        self.delay = self._initial


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """The first and the longest reconnect delay of a failure class, in seconds.

    A session of at least ``reset_after`` seconds resets the delay. A shorter session does not reset
    it, because many failing sessions end right after ``hello_ack``.
    """

    initial: float
    maximum: float
    reset_after: float = 30.0


BACKOFF_POLICIES = {
    "connection": BackoffPolicy(1, 30),
    "protocol": BackoffPolicy(1, 60),
    "auth": BackoffPolicy(10, 600),
    "incompatible": BackoffPolicy(120, 3600),
    # Two processes with the same worker id replace each other's sessions in turn.
    # Each session lasts until the other process reconnects.
    # Therefore ``reset_after`` is longer than the maximum delay.
    "limited": BackoffPolicy(10, 600, reset_after=1800),
    # The delays are short, because all rows wait during the search for a poison row.
    "poison": BackoffPolicy(1, 4),
}

#: Failure class of each exception type. The first match counts.
#: All other exceptions belong to the class "connection".
_CLASSES: tuple[tuple[type[AgentError], str], ...] = (
    (AuthenticationRejectedError, "auth"),
    (IncompatibleError, "incompatible"),
    (RemoteProtocolError, "protocol"),
    (SessionLimitError, "limited"),
    (PoisonRowError, "poison"),
)

#: ``agent_status`` reports the streaks of three failure classes.
#: Failures of all other classes count in one of these streaks.
_STREAKS = {"incompatible": "protocol", "limited": "connection", "poison": "connection"}


def failure_class(error: BaseException) -> str:
    """Return the failure class of ``error``, a key of ``BACKOFF_POLICIES``."""
    return next((name for kind, name in _CLASSES if isinstance(error, kind)), "connection")


class ReconnectBackoff:
    """Delays between attempts to start a session. Each failure class has its own delay."""

    def __init__(self, random: Callable[[], float] = _uniform) -> None:
        #: Consecutive failures since the last session, by the names that ``agent_status`` uses.
        self.streaks = _no_streaks()
        self._delays = {
            kind: Backoff(policy.initial, policy.maximum, jitter=JITTER, random=random)
            for kind, policy in BACKOFF_POLICIES.items()
        }

    def next(self, error: BaseException) -> float:
        """Return the seconds to wait after ``error``.

        If the response has a longer ``Retry-After``, that time is used, up to one hour.
        """
        kind = failure_class(error)
        self.streaks[_STREAKS.get(kind, kind)] += 1
        retry_after = getattr(error, "retry_after", None) or 0.0
        return max(
            self._delays[kind].next(), min(retry_after, BACKOFF_POLICIES["incompatible"].maximum)
        )

    def on_connected(self) -> dict[str, int]:
        """Reset the streaks at the start of a session; return the previous streaks."""
        ended, self.streaks = self.streaks, _no_streaks()
        return ended

    def on_session_end(self, seconds: float) -> None:
        """Reset the delays whose ``reset_after`` is at most ``seconds``, the session's length."""
        for kind, policy in BACKOFF_POLICIES.items():
            if seconds >= policy.reset_after:
                self._delays[kind].reset()


def _no_streaks() -> dict[str, int]:
    return {_STREAKS.get(kind, kind): 0 for kind in BACKOFF_POLICIES}
