"""The agent's own figures: what ``runtime.stats()`` returns and what a heartbeat carries."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.errors import DELETED
from z4j_bare.buffer.rows import CAPACITY, CORRUPTION, EVENT, RESULT
from z4j_bare.wire import frames

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.ring import Ring
    from z4j_bare.monitoring.hub_lag import HubLagMonitor


#: Reasons under which rows were lost that nobody could look at any more.
_UNREAD = (CORRUPTION, DELETED)


@dataclass(slots=True)
class Counters:
    """Totals since ``start()``. Only the loop that owns a number writes it."""

    stored: int = 0
    sent: int = 0
    frames: int = 0
    sessions: int = 0
    heartbeats: int = 0
    commands: int = 0
    unencodable: int = 0
    recut: int = 0
    restarts: Counter[str] = field(default_factory=Counter)
    last_flush_at: float | None = None
    last_error: str = ""
    transport: str = ""


class AgentMetrics:
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
        buffer: BufferManager,
        backend: BaseConcurrency,
        lateness: HubLagMonitor,
        started: float,
        health: Callable[[], Mapping[str, str]],
        dropped: Callable[[], Mapping[str, int]],
        restarts: Callable[[], int],
    ) -> None:
        self._ring = ring
        self._counters = counters
        self._buffer = buffer
        self._backend = backend
        self._lateness = lateness
        self._runtime_id = f"{os.getpid()}-{int(started * 1000)}"
        self._health = health
        self._dropped = dropped
        self._restarts = restarts

    def lost(self) -> dict[str, int]:
        """Return lost events by reason."""
        lost = dict(self._buffer.last_stats.lost)
        for reason, number in (
            ("ring", self._ring.lost),
            ("unencodable", self._counters.unencodable),
        ):
            if number:
                lost[reason] = lost.get(reason, 0) + number
        return lost

    def depth(self) -> int:
        """Return the rows that wait: in our store, and in a dead process's that we are adopting."""
        return self._buffer.last_stats.rows + self._buffer.orphan_rows

    def loss(self) -> dict[str, Any]:
        """Return ``telemetry_loss``, cumulative and strictly checked by the brain (2.6).

        A row is what the existing agent calls a frame. The reasons add up to all losses, and so do the kinds.
        """
        buffer, ring, unencodable = (
            self._buffer.last_stats,
            self._ring.lost,
            self._counters.unencodable,
        )
        reasons, kinds = Counter(buffer.lost), Counter(buffer.lost_kinds)
        evicted, unread = reasons.pop(CAPACITY, 0), sum(reasons.pop(each, 0) for each in _UNREAD)
        return {
            "buffer_id": buffer.buffer_id,
            "runtime_id": self._runtime_id,
            "capacity_evicted_frames": evicted + ring,
            "content_rejected_frames": reasons.total() + unencodable,
            "unclassified_frames": unread,
            "event_records": kinds.pop(EVENT, 0) + ring + unencodable,
            "command_results": kinds.pop(RESULT, 0),
            "other_frames": kinds.total(),
            "adapter_events": {
                name[:64]: min(max(0, int(number)), 2**53 - 1)
                for name, number in islice(self._dropped().items(), 32)
                if name
            },
        }

    def status(
        self, streaks: Mapping[str, int], connected_at: float, identity: frames.Identity
    ) -> bytes:
        """Return the payload of an ``agent_status``; ``connected_at`` in seconds since the epoch."""
        return frames.agent_status(
            streaks=streaks,
            connected_at=connected_at,
            session_age=self._backend.wall() - connected_at,
            buffer_depth=self.depth(),
            oldest_age=self._buffer.last_stats.oldest_age,
            identity=identity,
            loss=self.loss(),
        )

    def stats(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        counters, buffer, steps = self._counters, self._buffer.last_stats, self._backend.steps
        return {
            "concurrency": self._backend.name,
            "produced": self._ring.produced,
            "stored": counters.stored,
            "sent": counters.sent,
            "acked": self._buffer.acked_events,
            "lost": self.lost(),
            "buffered": buffer.rows,
            "buffer_bytes": buffer.bytes,
            "buffer_durable": self._buffer.durable,
            "buffer_failures": self._buffer.failures,
            "adopting": self._buffer.orphan_rows,
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
        return frames.heartbeat(
            buffer_size=self.depth(),
            dropped_events=sum(self.lost().values()) + sum(self._dropped().values()),
            last_flush_at=self._counters.last_flush_at,
            loss=self.loss(),
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
        own["z4j.buffer_durable"] = str(self._buffer.durable).lower()
        own["z4j.buffer_failures"] = str(self._buffer.failures)
        own["z4j.loop_restarts"] = str(sum(stats["restarts"].values()) + self._restarts())
        return own
