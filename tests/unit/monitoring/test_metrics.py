"""The losses and metrics that are sent to the brain, validated by the models of z4j_core."""

import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from z4j_core.transport.frames import AgentStatusPayload, HeartbeatPayload, TelemetryLossPayload

from z4j_bare.buffer.rows import NO_STATS
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.events.ring import Ring
from z4j_bare.monitoring.hub_lag import HubLagMonitor
from z4j_bare.monitoring.metrics import AgentMetrics, Counters
from z4j_bare.wire.frames import Identity, encode_fields


class FakeBuffer:
    """The attributes of a ``BufferManager`` that the metrics read."""

    durable = True
    failures = 0
    orphan_rows = 0
    acked_events = 3
    last_stats = replace(NO_STATS, buffer_id="b-1", rows=5, oldest_age=12.5)


class MetricsHarness:
    """Metrics of a ring with one slot, counters and a buffer that the test fills."""

    def __init__(self):
        self.backend = FakeConcurrency()
        self.ring = Ring(1, 100, self.backend.event())
        self.counters = Counters()
        self.buffer = FakeBuffer()
        self.dropped = {}
        self.channel_lost = 0
        self.metrics = AgentMetrics(
            ring=self.ring,
            counters=self.counters,
            buffer=self.buffer,
            backend=self.backend,
            hub_lag=HubLagMonitor(self.backend),
            started=self.backend.wall(),
            health=dict,
            channel_lost=lambda: self.channel_lost,
            dropped=lambda: self.dropped,
            unheard=int,
            restarts=int,
        )

    def lose(self, *pairs):
        """Lose rows by ``(reason, kind, number)``."""
        reasons, kinds = Counter(), Counter()
        for reason, kind, number in pairs:
            reasons[reason] += number
            kinds[kind] += number
        self.buffer.last_stats = replace(
            self.buffer.last_stats, lost=dict(reasons), lost_kinds=dict(kinds)
        )

    def overflow(self, number):
        """Lose ``number`` events in the ring."""
        for _ in range(number + 1):
            self.ring.put((len,))


@pytest.fixture
def harness():
    """A new harness."""
    return MetricsHarness()


def test_each_loss_is_counted_once_by_reason_and_by_kind(harness):
    """Each loss goes to one counter of reasons and to one of kinds."""
    harness.lose(
        ("capacity", "event", 7),
        ("capacity", "result", 2),
        ("poison", "event", 1),
        ("corrupt", "event", 20),
        ("capacity", "projection", 3),
    )
    harness.overflow(4)
    harness.counters.unencodable = 5
    harness.channel_lost = 6
    assert harness.metrics.lost()["channel"] == 6
    assert harness.metrics.stats()["produced"] == 5 + 6
    harness.ring.count_uncaptured()
    assert harness.metrics.lost()["uncaptured"] == 1
    assert harness.metrics.stats()["produced"] == 5 + 6 + 1
    loss = TelemetryLossPayload.model_validate(harness.metrics.loss())
    assert loss.buffer_id == "b-1"
    assert (
        loss.capacity_evicted_frames,
        loss.content_rejected_frames,
        loss.unclassified_frames,
    ) == (12 + 4 + 6, 1 + 5 + 1, 20)
    assert (loss.event_records, loss.command_results, loss.other_frames) == (
        28 + 4 + 6 + 5 + 1,
        2,
        3,
    )


def test_runs_that_are_not_kept_are_counted(harness):
    """stats() has the number of runs that could not be kept; 0 if nothing keeps runs."""
    assert harness.metrics.stats()["runs_not_kept"] == 0
    harness.ring.runs = SimpleNamespace(not_kept=2)
    assert harness.metrics.stats()["runs_not_kept"] == 2


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["capacity", "poison", "corrupt", "gone", "x"]),
            st.sampled_from(["event", "result", "projection"]),
            st.integers(1, 99),
        )
    ),
    st.integers(0, 5),
)
def test_reasons_and_kinds_both_add_up_to_all_losses(pairs, overflow):
    """The counts by reason, the counts by kind and the heartbeat's total are equal."""
    harness = MetricsHarness()
    harness.lose(*pairs)
    harness.overflow(overflow)
    loss = TelemetryLossPayload.model_validate(harness.metrics.loss())
    total = sum(number for _, _, number in pairs) + overflow
    assert (
        loss.capacity_evicted_frames + loss.content_rejected_frames + loss.unclassified_frames
        == total
    )
    assert loss.event_records + loss.command_results + loss.other_frames == total
    assert json.loads(harness.metrics.heartbeat())["dropped_events"] == total


def test_loss_keeps_adapter_events_within_limits_of_brain(harness):
    """Names and numbers of adapters are limited, because the brain closes a session otherwise."""
    harness.dropped = {
        "": 3,
        "e" * 99: -1,
        "f": 2**60,
        **{f"engine-{number}": number for number in range(50)},
    }
    beat = HeartbeatPayload.model_validate_json(harness.metrics.heartbeat())
    assert len(beat.telemetry_loss.adapter_events) <= 32
    assert beat.telemetry_loss.adapter_events["e" * 64] == 0


def test_heartbeat_reports_buffer_state_and_orphan_rows(harness):
    """The heartbeat has durability and failures; rows to be adopted count as buffered."""
    harness.buffer.durable, harness.buffer.failures, harness.buffer.orphan_rows = False, 3, 1000
    beat = json.loads(harness.metrics.heartbeat())
    assert beat["buffer_size"] == 1005
    assert beat["adapter_health"]["z4j.buffer_durable"] == "false"
    assert beat["adapter_health"]["z4j.buffer_failures"] == "3"
    assert (harness.metrics.stats()["buffer_failures"], harness.metrics.stats()["adopting"]) == (
        3,
        1000,
    )


def test_stats_count_changed_events_since_start(harness):
    """``fitted`` counts by part the events that were changed since the agent started."""
    assert harness.metrics.stats()["fitted"] == {}
    event = {"id": "i", "kind": "k", "engine": "celery", "occurred_at": "", "data": {"a": "\0"}}
    for task_id in ("t", "t" * 200):
        encode_fields({**event, "task_id": task_id})
    assert harness.metrics.stats()["fitted"] == {"nul": 2, "task_id": 1}


def test_agent_status_matches_model_of_brain(harness):
    """An ``agent_status`` has depth, age, streaks, versions and losses."""
    harness.lose(("capacity", "event", 7))
    began = harness.backend.wall()
    harness.backend.advance(90)
    identity = Identity(
        "celery",
        "1.13.0+green.1",
        "w",
        1,
        datetime.now(UTC),
        engines=("celery",) * 40,
        schedulers=("beat",),
    )
    status = AgentStatusPayload.model_validate_json(
        harness.metrics.status({"auth": 2, "protocol": 4, "connection": 4}, began, identity)
    )
    assert (
        status.auth_failure_streak,
        status.protocol_failure_streak,
        status.connection_failure_streak,
    ) == (2, 4, 4)
    assert status.last_successful_connect_at.timestamp() == began
    assert status.current_session_age_seconds == 90
    assert (status.buffer_depth, status.buffer_oldest_age_seconds) == (5, 12.5)
    assert (
        status.agent_version,
        status.protocol_version,
        len(status.engines),
        status.schedulers,
    ) == ("1.13.0+green.1", "2", 32, ["beat"])
    assert status.telemetry_loss.capacity_evicted_frames == 7


def test_ages_stay_within_limits_after_clock_was_set_back(harness):
    """The age of a session is never negative, and that of a row has an upper limit."""
    harness.buffer.last_stats = replace(harness.buffer.last_stats, oldest_age=1e12)
    identity = Identity("celery", "1", "w", 1, datetime.now(UTC))
    status = AgentStatusPayload.model_validate_json(
        harness.metrics.status({}, harness.backend.wall() + 3600, identity)
    )
    assert status.current_session_age_seconds == 0
    assert status.buffer_oldest_age_seconds == 315_360_000
