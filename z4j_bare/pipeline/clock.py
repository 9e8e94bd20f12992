"""Checks whether a wrong clock explains a rejected signature, and waits until the clock is set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from z4j_bare.errors import AgentError, AuthenticationRejectedError, NetworkError, RemoteError
from z4j_bare.wire.close_codes import (
    MAX_CLOCK_SKEW,
    explain_signature_error,
    may_be_rejected_signature,
)

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.interfaces import IEvent
    from z4j_bare.pipeline.session import Connection

#: Seconds between two checks whether the host's clock was set.
CHECK_INTERVAL = 2.0

#: If the host's clock is set by at least this many seconds, the wait for the next attempt ends.
STEP = 5.0


class ClockCheck:
    """Compares the clocks after the brain has rejected a signature.

    The difference measured at ``hello_ack`` may be outdated, because either clock may be set during
    a session.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        #: Asks the brain for its time. Returns the brain's clock minus this host's clock in
        #: seconds; ``None`` if the brain does not answer.
        self.ask: Callable[[], float | None] = _no_answer
        self._backend = backend
        self._wrong = False

    def explain(
        self, error: RemoteError | NetworkError, connection: Connection, *, ask: bool = True
    ) -> AgentError:
        """Return an error that names the clock or the key if ``error`` is a rejected signature.

        If this host's clock was set during the session, the error names that change.
        If not, the brain is asked for its time.

        :param ask: whether the brain may be asked.
        """
        if not may_be_rejected_signature(error):
            return error
        offset = connection.clock_offset
        if not _is_wrong(offset) and isinstance(error, RemoteError) and ask:
            asked = self.ask()
            offset = offset if asked is None else asked
        self._wrong = _is_wrong(offset)
        if isinstance(error, RemoteError):
            return explain_signature_error(error, offset)
        if not self._wrong:
            return error
        # Over long-poll, the same error (status 409) may only mean that the brain does not know the
        # session.
        rejected = AuthenticationRejectedError(str(error), code=error.code)
        return explain_signature_error(rejected, offset)

    def wait(self, event: IEvent, seconds: float) -> bool:
        """Wait for ``event`` for at most ``seconds``; return whether the clock was set.

        If the clock is wrong, the wait also ends when the clock is set. Without this rule, the
        agent could stay offline for up to 10 more minutes.
        """
        backend = self._backend
        deadline, base = backend.now() + seconds, self._base()
        wrong, self._wrong = self._wrong, False
        if not wrong:
            backend.wait(event, seconds)
            return False
        while (left := deadline - backend.now()) > 0:
            woken = backend.wait(event, min(left, CHECK_INTERVAL))
            if abs(self._base() - base) >= STEP:
                return True
            if woken:
                break
        return False

    def _base(self) -> float:
        return self._backend.wall() - self._backend.now()


def _no_answer() -> None:
    return None


def _is_wrong(offset: float | None) -> bool:
    return offset is not None and abs(offset) > MAX_CLOCK_SKEW
