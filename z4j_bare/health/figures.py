"""The agent's own figures: what ``runtime.stats()`` returns and what a heartbeat carries."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from z4j_bare.wire import frames

if TYPE_CHECKING:
    from z4j_bare.buffer.keeper import Keeper
    from z4j_bare.capture.ring import Ring
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.health.lateness import Lateness
    from z4j_bare.loops.counters import Counters


class Figures:
    """Reads what the rooms count; never touches the disk or the network.

    :param runtime_id: names this incarnation in loss reports.
    :param health: the engines' last answers.
    :param dropped: events that adapters lost themselves, by engine.
    :param restarts: restarts that the bridge counts.
    """

    def __init__(
        self,
        *,
        ring: Ring,
        counters: Counters,
        keeper: Keeper,
        seam: BaseConcurrency,
        lateness: Lateness,
        started: float,
        health: Callable[[], Mapping[str, str]],
        dropped: Callable[[], Mapping[str, int]],
        restarts: Callable[[], int],
    ) -> None:
        self._ring = ring
        self._counters = counters
        self._keeper = keeper
        self._seam = seam
        self._lateness = lateness
        self._runtime_id = f"{os.getpid()}-{int(started * 1000)}"
        self._health = health
        self._dropped = dropped
        self._restarts = restarts

    def lost(self) -> dict[str, int]:
        """Return lost events by reason."""
        lost = dict(self._keeper.last_stats.lost)
        for reason, number in (("ring", self._ring.lost), ("unencodable", self._counters.unencodable)):
            if number:
                lost[reason] = lost.get(reason, 0) + number
        return lost

    def stats(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        counters, buffer, steps = self._counters, self._keeper.last_stats, self._seam.steps
        return {
            "concurrency": self._seam.name,
            "produced": self._ring.produced,
            "stored": counters.stored,
            "sent": counters.sent,
            "acked": counters.acked,
            "lost": self.lost(),
            "buffered": buffer.rows,
            "buffer_bytes": buffer.bytes,
            "buffer_durable": self._keeper.durable,
            "frames": counters.frames,
            "sessions": counters.sessions,
            "heartbeats": counters.heartbeats,
            "commands": counters.commands,
            "recut": counters.recut,
            "transport": counters.transport,
            "restarts": dict(counters.restarts),
            "longest_step_seconds": round(steps.longest, 6),
            "longest_step_task": steps.longest_task,
            "last_error": counters.last_error,
        }

    def heartbeat(self) -> bytes:
        """Return the payload of the next heartbeat; its lateness figures are since the one before."""
        buffer, lost, dropped = self._keeper.last_stats, self.lost(), dict(self._dropped())
        return frames.heartbeat(
            buffer_size=buffer.rows,
            dropped_events=sum(lost.values()) + sum(dropped.values()),
            last_flush_at=self._counters.last_flush_at,
            loss={
                "buffer_id": buffer.buffer_id,
                "runtime_id": self._runtime_id,
                "event_records": sum(lost.values()),
                "capacity_evicted_frames": lost.get("capacity", 0),
                "adapter_events": dropped,
            },
            health={**self._health(), **self._own()},
        )

    def _own(self) -> dict[str, str]:
        stats = self.stats()
        names = ("concurrency", "transport", "produced", "stored", "sent", "acked")
        own = {f"z4j.{name}": str(stats[name]) for name in names}
        own |= {f"z4j.lost.{reason}": str(number) for reason, number in stats["lost"].items()}
        p99, longest, culprit = self._lateness.take()
        own["z4j.hub_lateness_p99_ms"] = f"{p99 * 1000:.1f}"
        own["z4j.hub_lateness_max_ms"] = f"{longest * 1000:.1f}"
        if culprit:
            own["z4j.hub_blocked_by"] = culprit[:500]
        own["z4j.loop_restarts"] = str(sum(stats["restarts"].values()) + self._restarts())
        return own
