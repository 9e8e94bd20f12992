"""The heartbeat: proof of life every 10 s, with the figures that an operator asks for first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from z4j_bare.wire.frames import frame_id, shrink_heartbeat

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.monitoring.metrics import Counters
    from z4j_bare.pipeline.link import Connection

#: Seconds between keepalives where heartbeats are switched off; the brain closes a session that is silent for 90.
QUIET_INTERVAL = 30.0

#: Seconds between two reports of how the agent is; the first follows a session's first heartbeat.
STATUS_INTERVAL = 60.0


class HeartbeatLoop:
    """Beats at once and then every ``interval`` seconds. It never touches the store: a slow disk must not look like death.

    :param payload: makes the frame's payload from what is in memory.
    :param status: makes that of ``agent_status``, which the brain keeps as history; ``None``: none is sent.
    """

    def __init__(
        self,
        link: Connection,
        backend: BaseConcurrency,
        counters: Counters,
        payload: Callable[[], bytes],
        *,
        interval: float,
        enabled: bool = True,
        status: Callable[[], bytes] | None = None,
    ) -> None:
        self._link = link
        self._backend = backend
        self._counters = counters
        self._payload = payload
        self._interval = interval if enabled else QUIET_INTERVAL
        self._enabled = enabled
        self._status = status
        self._status_at = float("-inf")

    def run(self) -> None:
        """Beat until the session ends. Raises ``NetworkError``."""
        while not self._link.closing.is_set():
            if self._enabled:
                cut = self._link.send_shrinking(
                    "heartbeat", frame_id("hb"), self._payload(), shrink_heartbeat
                )
                self._counters.recut += cut
                self._counters.heartbeats += 1
                self._report()
            else:
                self._link.send("event_batch", frame_id("ka"), b'{"events":[]}')
            self._backend.wait(self._link.closing, self._interval)

    def _report(self) -> None:
        now = self._backend.now()
        if self._status is not None and now - self._status_at >= STATUS_INTERVAL:
            self._link.send("agent_status", frame_id("as"), self._status())
            self._status_at = now
