"""Decides which failures and reconnects are logged, and at which level."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.pipeline.session import Connection

logger = logging.getLogger("z4j.runtime.pipeline.session")

#: Seconds after which a session without an ack counts as established.
ESTABLISHED_AFTER = 30.0

#: Number of consecutive failures from one log line at INFO to the next.
LOG_EVERY = 10

#: Minimum seconds between two lines about one cause, and between two warnings about one class of
#: failures. The time is kept for each cause, because two causes may alternate.
LOG_INTERVAL = 60.0

#: Maximum number of causes whose last line is remembered.
_MAX_CAUSES = 100

_NEVER = float("-inf")

#: Numbers, addresses and ids in an error's text. They may differ in each attempt.
_VARIABLE_PART = re.compile(r"[0-9a-f]*\d[0-9a-f.]*")


class ReconnectLog:
    """Counts consecutive failures, and logs failures and reconnects.

    The first failure is logged as a warning. A failure with another class than the previous failure
    is logged as a warning. If only the text differs, apart from numbers, the failure is logged at
    INFO, and once a minute as a warning. The last two rules log one cause at most once a minute.
    Every tenth failure is also logged at INFO.

    A session counts as established with the first ack, or after :data:`ESTABLISHED_AFTER` seconds.
    "connected again" is logged at that time, because the brain accepts a session before it checks a
    signature. If several sessions end soon after their first ack, only the first session is logged.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        #: Number of failures since a session lasted :data:`ESTABLISHED_AFTER` seconds.
        self.failures = 0
        self._backend = backend
        self._announced_at = 0
        self._cause = ""
        self._logged_at: dict[str, float] = {}
        self._warned_at = _NEVER

    def on_connected(self, transport: str, session_id: str) -> None:
        """Log the start of a session."""
        level = logging.DEBUG if self.failures else logging.INFO
        logger.log(level, "z4j: connected over %s, session %s", transport, session_id)

    def on_accepted(self) -> None:
        """Log that the session is established, unless this was logged for an earlier session."""
        if not self._announced_at:
            self._announce()

    def watch(self, connection: Connection) -> None:
        """Log and reset the counts when the session is :data:`ESTABLISHED_AFTER` seconds old."""
        if not self._backend.wait(connection.closing, ESTABLISHED_AFTER):
            if self._announced_at != self.failures:
                self._announce()
            self.failures = self._announced_at = 0
            self._logged_at.clear()

    def _announce(self) -> None:
        self._announced_at = self.failures
        logger.info("z4j: connected again after %d failed attempts", self.failures)

    def on_clock_set(self) -> None:
        """Log the next failure as a warning, even if its text differs only in numbers."""
        self._cause = ""
        self._logged_at.clear()
        self._warned_at = _NEVER

    def on_failure(self, kind: str, error: Exception, delay: float) -> None:
        """Log a failed attempt or a session that has ended with an error.

        :param kind: the failure class.
        :param delay: seconds until the next attempt.
        """
        level = self._level(kind, f"{kind}: {_VARIABLE_PART.sub('#', str(error))}")
        self.failures += 1
        logger.log(level, "z4j: no session (%s): %s; next attempt in %.0f s", kind, error, delay)

    def _level(self, kind: str, cause: str) -> int:
        now, previous = self._backend.now(), self._cause
        self._cause = cause
        if len(self._logged_at) >= _MAX_CAUSES:
            self._logged_at.clear()
        is_first = self.failures in (0, self._announced_at)
        is_news = cause != previous and now - self._logged_at.get(cause, _NEVER) >= LOG_INTERVAL
        if not is_first and not is_news:
            return logging.DEBUG if self.failures % LOG_EVERY else logging.INFO
        self._logged_at[cause] = now
        if is_first or kind != previous.partition(":")[0] or now - self._warned_at >= LOG_INTERVAL:
            self._warned_at = now
            return logging.WARNING
        return logging.INFO
