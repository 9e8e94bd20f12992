"""Exponential back-off, and the delays of the reconnect loop by failure class."""

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

#: Maximum random part that is added to a reconnect delay, relative to the delay. Without it workers
#: would reconnect at the same time.
JITTER = 0.3


class Backoff:
    """Delays that grow by ``factor`` from ``initial`` to ``maximum`` seconds, until ``reset``.

    :param jitter: upper bound of the random part that ``next`` adds, relative to the delay.
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
        """Return the next delay in seconds, and increase the one after it."""
        delay = self.delay
        self.increase()
        return delay * (1 + self._jitter * self._random()) if self._jitter else delay

    def increase(self) -> None:
        """Increase the next delay by one step."""
        self.delay = min(self._maximum, self.delay * self._factor)

    def reset(self) -> None:
        """Return to the initial delay."""
        self.delay = self._initial


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """The first and the longest reconnect delay of a failure class, in seconds.

    ``reset_after`` is the length of a session, in seconds, that resets the delay. A shorter one
    does not, because many sessions end right after ``hello_ack``.
    """

    initial: float
    maximum: float
    reset_after: float = 30.0


BACKOFF_POLICIES = {
    "connection": BackoffPolicy(1, 30),
    "protocol": BackoffPolicy(1, 60),
    "auth": BackoffPolicy(10, 600),
    "incompatible": BackoffPolicy(120, 3600),
    # Two processes with the same worker id replace each other's session in turn. Each session lasts
    # as long as the other process waits, so ``reset_after`` is longer than the longest delay.
    "limited": BackoffPolicy(10, 600, reset_after=1800),
    # Short, because the search for a poison row has few steps and blocks all other rows.
    "poison": BackoffPolicy(1, 4),
}

#: Failure class by exception type. The first match counts; any other exception is "connection".
_CLASSES: tuple[tuple[type[AgentError], str], ...] = (
    (AuthenticationRejectedError, "auth"),
    (IncompatibleError, "incompatible"),
    (RemoteProtocolError, "protocol"),
    (SessionLimitError, "limited"),
    (PoisonRowError, "poison"),
)

#: The ``agent_status`` frame has only three streaks. These failure classes count in the streak of
#: another class.
_STREAKS = {"incompatible": "protocol", "limited": "connection", "poison": "connection"}


def failure_class(error: BaseException) -> str:
    """Return the failure class of ``error``, a key of ``BACKOFF_POLICIES``."""
    return next((name for kind, name in _CLASSES if isinstance(error, kind)), "connection")


class ReconnectBackoff:
    """Delays between attempts to get a session, separate for each failure class.

    :param random: returns a float in [0, 1).
    """

    def __init__(self, random: Callable[[], float] = _uniform) -> None:
        #: Consecutive failures since the last session, by the names that ``agent_status`` uses.
        self.streaks = _no_streaks()
        self._delays = {
            kind: Backoff(policy.initial, policy.maximum, jitter=JITTER, random=random)
            for kind, policy in BACKOFF_POLICIES.items()
        }

    def next(self, error: BaseException) -> float:
        """Return the seconds to wait after ``error``.

        The delay is at least the server's ``Retry-After``, which is limited to an hour.
        """
        kind = failure_class(error)
        self.streaks[_STREAKS.get(kind, kind)] += 1
        retry_after = getattr(error, "retry_after", None) or 0.0
        return max(
            self._delays[kind].next(), min(retry_after, BACKOFF_POLICIES["incompatible"].maximum)
        )

    def on_connected(self) -> dict[str, int]:
        """Reset the streaks when a session begins; return the streaks that it ends."""
        ended, self.streaks = self.streaks, _no_streaks()
        return ended

    def on_session_end(self, seconds: float) -> None:
        """Reset the delays of the failure classes whose ``reset_after`` has passed."""
        for kind, policy in BACKOFF_POLICIES.items():
            if seconds >= policy.reset_after:
                self._delays[kind].reset()


def _no_streaks() -> dict[str, int]:
    return {_STREAKS.get(kind, kind): 0 for kind in BACKOFF_POLICIES}
