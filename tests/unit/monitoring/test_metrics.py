"""What the brain is told of losses and of the agent itself, against the brain's own models."""

import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from z4j_core.transport.frames import AgentStatusPayload, HeartbeatPayload, TelemetryLossPayload

from z4j_bare.buffer.rows import NO_STATS
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.events.ring import Ring
from z4j_bare.monitoring.hub_lag import HubLagMonitor
from z4j_bare.monitoring.metrics import AgentMetrics, Counters
from z4j_bare.wire.frames import Identity


class FakeKeeper:
    """What figures read of it."""

    durable = True
    failures = 0
    orphan_rows = 0
    acked_events = 3
    last_stats = replace(NO_STATS, buffer_id="b-1", rows=5, oldest_age=12.5)


class Accounting:
    """Figures over a ring of one, counters and a keeper that a test fills in."""

    def __init__(self):
        self.backend = FakeConcurrency()
        self.ring = Ring(1, 100, self.backend.event())
        self.counters = Counters()
        self.buffer = FakeKeeper()
        self.dropped = {}
        self.figures = AgentMetrics(
            ring=self.ring,
            counters=self.counters,
            buffer=self.buffer,
            backend=self.backend,
            lateness=HubLagMonitor(self.backend),
            started=self.backend.wall(),
            health=dict,
            dropped=lambda: self.dropped,
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
        for _ in range(number + 1):
            self.ring.put((len,))


@pytest.fixture
def books():
    return Accounting()


def test_each_loss_has_its_place(books):
    """Reasons and kinds of the store, the ring and the encoder land in the brain's counters, each loss once per group."""
    books.lose(
        ("capacity", "event", 7),
        ("capacity", "result", 2),
        ("poison", "event", 1),
        ("corrupt", "event", 20),
        ("capacity", "projection", 3),
    )
    books.overflow(4)
    books.counters.unencodable = 5
    loss = TelemetryLossPayload.model_validate(books.figures.loss())
    assert loss.buffer_id == "b-1"
    assert (
        loss.capacity_evicted_frames,
        loss.content_rejected_frames,
        loss.unclassified_frames,
    ) == (12 + 4, 1 + 5, 20)
    assert (loss.event_records, loss.command_results, loss.other_frames) == (28 + 4 + 5, 2, 3)


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
def test_both_groups_add_up_to_all_losses(pairs, overflow):
    """Whatever was lost, reasons and kinds tell of the same number, and the heartbeat's total is that number."""
    books = Accounting()
    books.lose(*pairs)
    books.overflow(overflow)
    loss = TelemetryLossPayload.model_validate(books.figures.loss())
    total = sum(number for _, _, number in pairs) + overflow
    assert (
        loss.capacity_evicted_frames + loss.content_rejected_frames + loss.unclassified_frames
        == total
    )
    assert loss.event_records + loss.command_results + loss.other_frames == total
    assert json.loads(books.figures.heartbeat())["dropped_events"] == total


def test_an_adapters_figures_cannot_end_the_session(books):
    """The brain closes a session over a bad loss report, so names and numbers of adapters are brought within its limits."""
    books.dropped = {
        "": 3,
        "e" * 99: -1,
        "f": 2**60,
        **{f"engine-{number}": number for number in range(50)},
    }
    beat = HeartbeatPayload.model_validate_json(books.figures.heartbeat())
    assert len(beat.telemetry_loss.adapter_events) <= 32
    assert beat.telemetry_loss.adapter_events["e" * 64] == 0


def test_the_heartbeat_says_how_the_disk_is(books):
    """Durability and failures are figures that an operator can see; rows that wait to be adopted are buffered rows."""
    books.buffer.durable, books.buffer.failures, books.buffer.orphan_rows = False, 3, 1000
    beat = json.loads(books.figures.heartbeat())
    assert beat["buffer_size"] == 1005
    assert beat["adapter_health"]["z4j.buffer_durable"] == "false"
    assert beat["adapter_health"]["z4j.buffer_failures"] == "3"
    assert (books.figures.stats()["buffer_failures"], books.figures.stats()["adopting"]) == (
        3,
        1000,
    )


def test_the_status_is_the_brains_model(books):
    """An ``agent_status`` passes the brain's validation and tells depth, age, streaks, versions and losses."""
    books.lose(("capacity", "event", 7))
    began = books.backend.wall()
    books.backend.advance(90)
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
        books.figures.status({"auth": 2, "protocol": 4, "connection": 4}, began, identity)
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


def test_a_clock_set_back_makes_no_negative_age(books):
    """A session that began in the future is new, and a row of before the epoch is as old as the brain allows."""
    books.buffer.last_stats = replace(books.buffer.last_stats, oldest_age=1e12)
    identity = Identity("celery", "1", "w", 1, datetime.now(UTC))
    status = AgentStatusPayload.model_validate_json(
        books.figures.status({}, books.backend.wall() + 3600, identity)
    )
    assert status.current_session_age_seconds == 0
    assert status.buffer_oldest_age_seconds == 315_360_000
