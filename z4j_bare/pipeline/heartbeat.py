"""Sends heartbeats with the agent's health every 10 s, and status reports every 60 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from z4j_bare.wire.frames import frame_id, shrink_heartbeat

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.monitoring.metrics import Counters
    from z4j_bare.pipeline.session import Connection

#: Seconds between two keepalive frames if heartbeats are disabled.
#: The brain closes a session in which it receives nothing for 90 s.
KEEPALIVE_INTERVAL = 30.0

#: Seconds between two ``agent_status`` frames.
#: The first is sent after the session's first heartbeat.
STATUS_INTERVAL = 60.0


class HeartbeatLoop:
    """Sends a heartbeat at once, then every ``interval`` seconds and when ``beat`` is set.

    The loop does not use the store, so a slow disk does not delay heartbeats.

    :param payload: returns the payload of a heartbeat, without I/O.
    :param status: returns the payload of an ``agent_status`` frame; if ``None``, the loop sends no
        such frame.
    """

    def __init__(
        self,
        connection: Connection,
        backend: BaseConcurrency,
        counters: Counters,
        payload: Callable[[], bytes],
        *,
        interval: float,
        enabled: bool = True,
        status: Callable[[], bytes] | None = None,
    ) -> None:
        self._connection = connection
        self._backend = backend
        self._counters = counters
        self._payload = payload
        self._interval = interval if enabled else KEEPALIVE_INTERVAL
        self._enabled = enabled
        self._status = status
        self._status_at = float("-inf")

    def run(self) -> None:
        """Send heartbeats until the session ends. Raises ``NetworkError``."""
        while True:
            self._connection.beat.clear()
            if self._connection.closing.is_set():
                return
            if self._enabled:
                self._counters.recut += self._connection.send_shrinking(
                    "heartbeat", frame_id("hb"), self._payload(), shrink_heartbeat
                )
                self._counters.heartbeats += 1
                self._send_status()
            else:
                self._connection.send("event_batch", frame_id("ka"), b'{"events":[]}')
            self._backend.wait(self._connection.beat, self._interval)

    def _send_status(self) -> None:
        now = self._backend.now()
        if self._status is not None and now - self._status_at >= STATUS_INTERVAL:
            self._connection.send("agent_status", frame_id("as"), self._status())
            self._status_at = now
