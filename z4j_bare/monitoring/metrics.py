"""The agent's own metrics, for ``runtime.stats()`` and for the heartbeat."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.errors import DELETED
from z4j_bare.buffer.rows import CAPACITY, CORRUPTION, EVENT, RESULT
from z4j_bare.wire import frames
from z4j_bare.wire.fit import fitted

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.ring import Ring
    from z4j_bare.events.task_counts import TaskCounts
    from z4j_bare.monitoring.hub_lag import HubLagMonitor

#: Loss reasons of unreadable rows.
_UNREADABLE = (CORRUPTION, DELETED)

# The next constants are the brain's limits for ``adapter_events``.
# The brain closes the session if a frame exceeds one of these limits.

#: Maximum number of adapters in ``adapter_events``.
_MAX_ADAPTERS = 32

#: Maximum characters of an adapter's name.
_MAX_ADAPTER_NAME = 64

#: Maximum count of the events that an adapter has lost.
_MAX_ADAPTER_EVENTS = 2**53 - 1

#: Maximum characters of the blocking code in a heartbeat.
_MAX_BLOCKING_CODE = 500


@dataclass(slots=True)
class Counters:
    """Totals since ``start()``. Each total is written by a single loop.

    ``unencodable`` counts events for which the encoder failed. ``recut`` counts payloads that were
    truncated to fit into a frame. ``last_flush_at`` is in seconds since the epoch.
    """

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
    turned_away: bool = False


class AgentMetrics:
    """Combines the counters of all packages; does no I/O.

    :param started: when the agent started, in seconds since the epoch.
    :param channel_lost: returns the number of events that a worker's children could not send.
    :param dropped: returns the number of events that adapters have lost, by engine.
    :param unheard: returns the number of accepted tasks without an event of their start.
    :param restarts: returns the number of restarts of the bridge and of the event sources.
    """

    def __init__(
        self,
        *,
        ring: Ring,
        counters: Counters,
        buffer: BufferManager,
        backend: BaseConcurrency,
        hub_lag: HubLagMonitor,
        started: float,
        health: Callable[[], Mapping[str, str]],
        channel_lost: Callable[[], int],
        dropped: Callable[[], Mapping[str, int]],
        unheard: Callable[[], int],
        restarts: Callable[[], int],
    ) -> None:
        self._ring = ring
        self._counters = counters
        self._buffer = buffer
        self._backend = backend
        #: The lag of the hub. ``z4j-bare hub`` and ``z4j-bare metrics`` also show it.
        self.hub_lag = hub_lag
        self._runtime_id = f"{os.getpid()}-{int(started * 1000)}"
        self._health = health
        self._channel_lost = channel_lost
        self._dropped = dropped
        self._unheard = unheard
        self._restarts = restarts
        self._fitted_before = fitted.copy()

    @property
    def turned_away(self) -> bool:
        """Whether the last session ended because the token has too many sessions."""
        return self._counters.turned_away

    @property
    def task_counts(self) -> TaskCounts:
        """The counts of the tasks."""
        return self._ring.counts

    def health(self) -> dict[str, str]:
        """Return the engines' part of the heartbeat's health, without the details of workers."""
        items = self._health().items()
        return {key: value for key, value in items if not key.endswith(".worker_details")}

    def queue_depths(self) -> dict[str, dict[str, int]]:
        """Return the last measured depth of each queue by engine."""
        depths = {}
        for key, text in self._health().items():
            engine, _, name = key.rpartition(".")
            if name == "queue_depths":
                with suppress(ValueError):  # an adapter may return any text
                    depths[engine] = json.loads(text)
        return depths

    def lost(self) -> dict[str, int]:
        """Return the number of lost rows and events by reason."""
        lost = dict(self._buffer.last_stats.lost)
        for reason, number in (
            ("ring", self._ring.lost),
            ("channel", self._channel_lost()),
            ("unencodable", self._counters.unencodable),
            ("uncaptured", self._ring.uncaptured),
        ):
            if number:
                lost[reason] = lost.get(reason, 0) + number
        return lost

    def depth(self) -> int:
        """Return the number of unsent rows in this store and in the orphan being adopted."""
        return self._buffer.last_stats.rows + self._buffer.orphan_rows

    def loss(self) -> dict[str, Any]:
        """Return ``telemetry_loss``: the cumulative losses.

        Losses of the buffer are counted since the buffer was created, all others since the agent
        was created. The protocol calls a row a frame. The counts by reason add up to the number of
        all losses, and so do the counts by kind. The brain validates this payload strictly
        (``docs/protocol.md``, Heartbeats).
        """
        buffer = self._buffer.last_stats
        unencodable = self._counters.unencodable + self._ring.uncaptured
        dropped = self._ring.lost + self._channel_lost()
        reasons, kinds = Counter(buffer.lost), Counter(buffer.lost_kinds)
        evicted = reasons.pop(CAPACITY, 0)
        unreadable = sum(reasons.pop(reason, 0) for reason in _UNREADABLE)
        return {
            "buffer_id": buffer.buffer_id,
            "runtime_id": self._runtime_id,
            "capacity_evicted_frames": evicted + dropped,
            "content_rejected_frames": reasons.total() + unencodable,
            "unclassified_frames": unreadable,
            "event_records": kinds.pop(EVENT, 0) + dropped + unencodable,
            "command_results": kinds.pop(RESULT, 0),
            "other_frames": kinds.total(),
            "adapter_events": {
                name[:_MAX_ADAPTER_NAME]: min(max(0, int(number)), _MAX_ADAPTER_EVENTS)
                for name, number in islice(self._dropped().items(), _MAX_ADAPTERS)
                if name
            },
        }

    def status(
        self, streaks: Mapping[str, int], connected_at: float, identity: frames.Identity
    ) -> bytes:
        """Return the payload of an ``agent_status`` frame.

        :param streaks: the number of consecutive failures by failure class.
        :param connected_at: start of the session in seconds since the epoch.
        """
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
        """Return all metrics as JSON types, for ``runtime.stats()``."""
        counters, buffer, steps = self._counters, self._buffer.last_stats, self._backend.steps
        return {
            "concurrency": self._backend.name,
            "produced": self._ring.produced + self._ring.uncaptured + self._channel_lost(),
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
            "fitted": dict(fitted - self._fitted_before),
            "starts_unheard": self._unheard(),
            "runs_not_kept": 0 if self._ring.runs is None else self._ring.runs.not_kept,
            "transport": counters.transport,
            "restarts": dict(counters.restarts),
            "longest_step_seconds": round(steps.longest, 6),
            "longest_step_task": steps.longest_task,
            "last_error": counters.last_error,
        }

    def heartbeat(self) -> bytes:
        """Return the next heartbeat's payload, with the hub's lag since the previous heartbeat."""
        return frames.heartbeat(
            buffer_size=self.depth(),
            dropped_events=sum(self.lost().values()) + sum(self._dropped().values()),
            last_flush_at=self._counters.last_flush_at,
            loss=self.loss(),
            health={**self._health(), **self._agent_health()},
        )

    def _agent_health(self) -> dict[str, str]:
        stats = self.stats()
        names = ("concurrency", "transport", "produced", "stored", "sent", "acked")
        health = {f"z4j.{name}": str(stats[name]) for name in names}
        health |= {f"z4j.lost.{reason}": str(number) for reason, number in stats["lost"].items()}
        p99, longest, blocking_code = self.hub_lag.drain()
        health["z4j.hub_lateness_p99_ms"] = f"{p99 * 1000:.1f}"
        health["z4j.hub_lateness_max_ms"] = f"{longest * 1000:.1f}"
        if blocking_code:
            health["z4j.hub_blocked_by"] = blocking_code[:_MAX_BLOCKING_CODE]
        health["z4j.buffer_durable"] = str(self._buffer.durable).lower()
        health["z4j.buffer_failures"] = str(self._buffer.failures)
        health["z4j.loop_restarts"] = str(sum(stats["restarts"].values()) + self._restarts())
        return health
