"""Store to brain, in virtual time: pacing, ack timeouts, results, poison rows, disk failures."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.session import SessionHarness
from z4j_bare.buffer.maintenance import MAX_DEFER_SECONDS
from z4j_bare.errors import NetworkError, PoisonRowError, ScheduleStreamError
from z4j_bare.pipeline.send import FRAME_BYTES, MAX_SKIPS, POLL_BUSY
from z4j_bare.wire.session import HelloAck
from z4j_bare.wire.window import (
    ACK_DEADLINE,
    ACK_PAUSE,
    FRAME_EVENTS_INITIAL,
    FRAME_EVENTS_MAX,
    PROBE_DELAY_INITIAL,
)


class SenderHarness(SessionHarness):
    """A session harness whose sender runs."""

    def __init__(self, *args):
        super().__init__(*args)
        self.start_sender()

    def hub_timer(self, seconds, function, *, once):
        """Stand in for ``BaseConcurrency.timer`` of a hub."""
        assert once
        return self.backend.spawn(lambda: (self.backend.sleep(seconds), function()), name="hub")


@pytest.fixture(params=["hub", "no hub"])
def harness(request):
    """A running sender: a hub's timer wakes it after an ack's pause, or it waits for the end."""
    harness = SenderHarness()
    if request.param == "hub":
        harness.backend.timer = harness.hub_timer
    return harness


def test_events_are_sent_once_in_order(harness):
    """All events are sent once, in order, in frames of bounded size, and leave the store."""
    harness.ack_immediately()
    harness.store(2600)
    harness.backend.advance(5)
    assert harness.transport.event_numbers() == list(range(2600))
    sizes = [len(frame["payload"]["events"]) for frame in harness.transport.frames("event_batch")]
    assert (sizes[0], max(sizes)) == (FRAME_EVENTS_INITIAL, FRAME_EVENTS_MAX)
    assert harness.buffered() == 0
    assert (harness.counters.sent, harness.buffer.acked_events) == (2600, 2600)
    assert harness.sender.is_idle()


def test_sender_holds_events_while_frame_in_flight(harness):
    """A second frame waits for the ack of the first and for the pause behind it."""
    harness.store(2600)
    harness.backend.advance(1.5)
    assert len(harness.transport.event_numbers()) == FRAME_EVENTS_INITIAL
    harness.ack()
    harness.backend.advance(ACK_PAUSE - 0.01)
    assert len(harness.transport.event_numbers()) == FRAME_EVENTS_INITIAL
    harness.backend.advance(0.02)
    assert (
        len(harness.transport.event_numbers())
        == FRAME_EVENTS_INITIAL + harness.sender._pacing.window.frame_events
    )
    harness.backend.advance(MAX_DEFER_SECONDS - 0.1)
    assert harness.buffered() == 2600 - FRAME_EVENTS_INITIAL
    assert not harness.sender.is_idle()


def test_hub_timer_wakes_sender_once_per_ack(monkeypatch):
    """With a hub, an ack wakes the sender at the end of the pause: one step for each frame."""
    harness, steps = SenderHarness(), []
    harness.backend.timer = harness.hub_timer
    monkeypatch.setattr(
        harness.sender,
        "_step",
        lambda *args, step=harness.sender._step: steps.append(1) or step(*args),
    )
    harness.store(2000)
    harness.backend.advance(1)
    begun = len(steps)
    for _ in range(3):
        harness.ack()
        harness.backend.advance(ACK_PAUSE + 0.01)
    assert (len(harness.transport.frames("event_batch")), len(steps) - begun) == (4, 3)


@pytest.mark.parametrize("acknowledged", [1, 2])
def test_acked_rows_are_deleted_within_four_seconds(harness, acknowledged):
    """Acknowledged rows are deleted within 4 s, even if nothing is stored and others await acks."""
    harness.store(FRAME_EVENTS_INITIAL + 5)
    harness.connection.wake.set()
    harness.backend.advance(0.1)
    harness.buffer.stats()  # otherwise the next refresh of the stats would delete them
    for _ in range(acknowledged):
        harness.ack()
        harness.backend.advance(ACK_PAUSE + 0.1)
    harness.backend.advance(POLL_BUSY + MAX_DEFER_SECONDS)
    assert harness.disk.store.size() == (5 if acknowledged == 1 else 0)


def test_ack_wakes_sender_after_long_wait(harness):
    """After a wait longer than the poll interval an ack still wakes the sender."""
    harness.store(3000)
    harness.backend.advance(2.2)
    before = len(harness.transport.event_numbers())
    harness.ack()
    harness.backend.advance(ACK_PAUSE + 0.01)
    assert len(harness.transport.event_numbers()) > before


@pytest.mark.parametrize("begun", [False, True])
def test_slow_read_does_not_lose_wakeup(harness, monkeypatch, begun):
    """After a slow read that ends behind the pause, the next frame is sent at once."""
    drain = harness.buffer.read_next

    def slowly(*query):
        harness.backend.sleep(0.5)
        return drain(*query)

    harness.store(200)
    harness.backend.advance(0.5)
    monkeypatch.setattr(harness.buffer, "read_next", slowly)
    if begun:
        harness.connection.wake.set()
        harness.backend.advance(0.01)
    harness.ack()
    harness.backend.advance(1.2)
    assert len(harness.transport.frames("event_batch")) == 2


def test_frames_stay_below_size_limit(harness):
    """Rows of 30 kB are sent a few per frame, and no frame exceeds 128 KiB."""
    harness.ack_immediately()
    harness.store(40, size=30_000)
    harness.backend.advance(30)
    sizes = [
        len(json.dumps(frame, separators=(",", ":")))
        for frame in harness.transport.frames("event_batch")
    ]
    assert max(sizes) <= FRAME_BYTES
    assert harness.transport.event_numbers() == list(range(40))


def test_event_over_frame_limit_is_truncated():
    """An event over the brain's frame limit, which it would close with 4400, is truncated."""
    harness = SenderHarness(HelloAck("a", "p", "s", max_frame_bytes=4096))
    harness.ack_immediately()
    harness.buffer.append(
        [
            (
                "event",
                "",
                json.dumps(
                    {"id": "e-1", "n": 1, "data": {"task_name": "t", "result": "x" * 50_000}}
                ).encode(),
            )
        ]
    )
    harness.connection.wake.set()
    harness.backend.advance(2)
    (event,) = (
        event
        for frame in harness.transport.frames("event_batch")
        for event in frame["payload"]["events"]
    )
    assert len(json.dumps(harness.transport.sent[0][1])) <= 4096
    assert (event["id"], event["data"]["task_name"]) == ("e-1", "t")
    assert harness.buffered() == 0


def test_results_overtake_events(harness):
    """A result is sent before thousands of waiting events, with an empty batch right behind it."""
    harness.store(5000)
    harness.backend.advance(0.5)
    harness.store(1, kind="result")
    harness.backend.advance(0.01)
    kinds = [frame["type"] for _, frame in harness.transport.sent]
    assert kinds[-2:] == ["command_result", "event_batch"]
    assert harness.transport.sent[-1][1]["payload"]["events"] == []
    assert harness.transport.sent[-2][1]["id"] == "c-5000"


def test_events_during_flight_are_sent_in_one_frame(harness):
    """Events stored while a frame is in flight wait for its ack and are sent together."""

    def more(events):
        harness.store(events, wake=False)
        harness.sender.on_stored(events)
        harness.backend.advance(0.01)

    for _ in range(6):
        more(5)
    assert harness.transport.event_numbers() == list(range(5))
    assert not harness.sender.is_idle()
    more(FRAME_EVENTS_INITIAL - 30)
    assert harness.transport.event_numbers() == list(range(5))
    harness.ack()
    harness.backend.advance(ACK_PAUSE + 0.01)
    assert harness.transport.event_numbers() == list(range(FRAME_EVENTS_INITIAL))
    assert len(harness.transport.frames("event_batch")) == 2
    assert not harness.sender.is_idle()


def batches(harness):
    """Return the numbers of the events in each frame; an empty list is an empty frame."""
    return [
        [event["n"] for event in frame["payload"]["events"]]
        for frame in harness.transport.frames("event_batch")
    ]


def ack_except(harness, *skipped):
    """Let the brain acknowledge each frame at once, except those with these positions."""
    positions = iter(range(1_000_000))

    def on_frame(frame):
        if frame["type"] == "event_batch" and next(positions) not in skipped:
            harness.sender.on_ack(frame["id"])

    harness.transport.on_frame = on_frame


def test_skipped_last_frame_is_sent_again_within_seconds(harness):
    """An empty frame proves that the brain has skipped the last frame, which is sent again."""
    ack_except(harness, 0)
    harness.store(5)
    harness.backend.advance(PROBE_DELAY_INITIAL - 0.1)
    assert batches(harness) == [list(range(5))]
    harness.backend.advance(5.1)
    assert batches(harness) == [list(range(5)), [], list(range(5))]
    harness.backend.advance(3)
    assert harness.buffered() == 0
    assert harness.sender.is_idle()


@pytest.mark.parametrize("skipped", range(4))
def test_skipped_last_frame_is_sent_again_although_probes_are_skipped(harness, skipped):
    """The frame is sent again within 15 s although the first empty frames are skipped as well."""
    ack_except(harness, *range(skipped + 1))
    harness.store(5)
    harness.backend.advance(15)
    assert batches(harness) == [list(range(5)), *([[]] * (skipped + 1)), list(range(5))]
    harness.backend.advance(3)
    assert harness.buffered() == 0


def test_no_event_overtakes_skipped_frame(harness):
    """Events that are stored behind a skipped frame are sent after it, and none twice."""
    ack_except(harness, 0)
    harness.store(5)
    harness.backend.advance(0.5)
    harness.store(7)
    harness.backend.advance(10)
    assert harness.transport.event_numbers() == [*range(5), *range(12)]
    assert harness.buffered() == 0


def test_frame_under_way_is_not_sent_again(harness):
    """A frame that a slow brain acknowledges late is not sent again, however many probes follow."""
    harness.store(5)
    harness.backend.advance(ACK_DEADLINE - 5)
    assert harness.transport.event_numbers() == list(range(5))
    harness.ack()
    harness.backend.advance(ACK_PAUSE)
    harness.ack(len(batches(harness)) - 1)
    harness.backend.advance(20)
    assert harness.transport.event_numbers() == list(range(5))
    assert harness.buffered() == 0


def test_stopping_agent_sends_skipped_frame_again_at_once(harness):
    """Without pacing, the rows of a skipped frame are sent again as soon as the skip is proven."""
    ack_except(harness, 0)
    harness.store(FRAME_EVENTS_INITIAL)
    harness.backend.advance(0.1)
    harness.store(5)
    harness.sender.disable_pacing()
    harness.backend.advance(0.1)
    assert sorted(set(harness.transport.event_numbers())) == list(range(FRAME_EVENTS_INITIAL + 5))
    assert harness.transport.event_numbers().count(0) == 2
    harness.backend.advance(3)
    assert harness.buffered() == 0


def test_result_in_skipped_batch_is_sent_again(harness):
    """If the brain skips the batch that follows a result, the result is sent again."""
    ack_except(harness, 0)
    harness.store(1, kind="result")
    harness.backend.advance(15)
    assert len(harness.transport.frames("command_result")) == 2
    assert harness.buffered() == 0


def test_skipped_suspected_row_is_tried_again():
    """A suspected row whose frame the brain skips is tried again, and is not dropped."""
    harness = SenderHarness()
    harness.end_session()
    harness.store(1, wake=False)
    for _ in range(2):
        harness.buffer.increment_attempts([1])
    harness.start_session()
    ack_except(harness, 1)  # the first frame is the empty one that shows that the session works
    harness.backend.advance(15)
    assert batches(harness) == [[], [0], [], [0]]
    assert harness.buffer.stats().lost == {}
    assert harness.buffered() == 0


def test_single_event_is_sent_immediately(harness):
    """A single event is sent as soon as it is stored, or at the end of the pause after an ack."""
    harness.ack_immediately()
    for number in range(1, 4):
        harness.store(1, wake=False)
        harness.sender.on_stored(1)
        harness.backend.advance(0.01)
        assert len(harness.transport.event_numbers()) == number
        harness.backend.advance(ACK_PAUSE)
    harness.store(1, wake=False)
    harness.sender.on_stored(1)
    harness.backend.advance(0.01)
    harness.store(1, wake=False)
    harness.sender.on_stored(1)
    harness.backend.advance(0.01)
    assert len(harness.transport.event_numbers()) == 4
    harness.backend.advance(ACK_PAUSE)
    assert len(harness.transport.event_numbers()) == 5
    harness.backend.advance(ACK_PAUSE)
    assert harness.sender.is_idle()


def test_result_is_deleted_by_ack_of_next_batch(harness):
    """A result is sent once and leaves the store with the ack of the batch behind it."""
    harness.store(1, kind="result")
    harness.backend.advance(5)
    assert harness.buffered() == 1
    assert not harness.sender.is_idle()
    harness.ack()
    harness.backend.advance(5)
    assert harness.buffered() == 0
    assert len(harness.transport.frames("command_result")) == 1
    assert harness.buffer.acked_events == 0, "results are not events"


def test_schedule_rows_overtake_events(harness):
    """Schedule rows are sent before events, one per frame, and a result after those it reports."""
    harness.store(3000)
    harness.backend.advance(0.5)
    before = len(harness.transport.sent)
    harness.store(3, kind="projection", size=60_000, wake=False)
    harness.store(1, kind="result")
    harness.backend.advance(0.01)
    sent = [frame for _, frame in harness.transport.sent[before:]]
    assert [frame["type"] for frame in sent] == ["event_batch"] * 3 + [
        "command_result",
        "event_batch",
    ]
    assert [[event["n"] for event in frame["payload"]["events"]] for frame in sent[:3]] == [
        [3000],
        [3001],
        [3002],
    ]


def test_schedule_rows_are_not_counted_as_events(harness):
    """Schedule rows leave the store with their acks and are not counted as events."""
    harness.ack_immediately()
    harness.store(3, kind="projection")
    harness.backend.advance(5)
    assert harness.buffered() == 0
    assert (harness.counters.sent, harness.buffer.acked_events) == (0, 0)
    assert harness.transport.event_numbers() == [0, 1, 2]
    harness.store(2)
    harness.backend.advance(5)
    assert (harness.counters.sent, harness.buffer.acked_events) == (2, 2)


def test_sender_ends_session_when_schedules_get_no_ack_twice():
    """A stream without acks is sent once more, in order; then a new session is needed."""
    harness = SessionHarness()
    harness.store(2, kind="projection")
    began = harness.backend.now()
    ended = harness.run_loop(lambda: harness.sender.run(harness.connection))
    harness.backend.advance(ACK_DEADLINE + 5)
    assert harness.transport.event_numbers() == [0, 1, 0, 1]
    assert not ended
    harness.backend.advance(ACK_DEADLINE + 5)
    assert harness.transport.event_numbers() == [0, 1, 0, 1]
    assert [type(error) for error in ended] == [ScheduleStreamError]
    assert harness.backend.now() - began > 2 * ACK_DEADLINE


def test_skipped_schedule_rows_are_sent_again_in_order():
    """A skipped schedule row is sent again with those behind it, which are out of sequence."""
    harness = SenderHarness()
    ack_except(harness, 0, 1, 2)
    harness.store(3, kind="projection")
    harness.backend.advance(10)
    assert harness.transport.event_numbers() == [0, 1, 2, 0, 1, 2]
    assert harness.buffered() == 0


def test_sender_ends_session_when_schedules_are_always_skipped():
    """If only schedule rows get no ack, a row was lost, and a new session starts within 30 s."""
    harness = SessionHarness()

    def on_frame(frame):
        if frame["type"] == "event_batch" and not frame["payload"]["events"]:
            harness.sender.on_ack(frame["id"])

    harness.transport.on_frame = on_frame
    harness.store(2, kind="projection")
    ended = harness.run_loop(lambda: harness.sender.run(harness.connection))
    harness.backend.advance(40)
    assert harness.transport.event_numbers() == [0, 1] * MAX_SKIPS
    assert [type(error) for error in ended] == [ScheduleStreamError]


def test_many_results_do_not_starve_events(harness):
    """Events are sent in between while hundreds of results wait."""
    harness.ack_immediately()
    harness.store(400, kind="result", wake=False)
    harness.store(10)
    harness.backend.advance(5)
    kinds = [
        len(frame["payload"]["events"]) > 0 for frame in harness.transport.frames("event_batch")
    ]
    assert kinds.index(True) < 3
    assert len(harness.transport.frames("command_result")) == 400
    assert harness.buffered() == 0


def test_slow_brain_delays_results_by_five_seconds():
    """With a brain of 100 events/s a result waits at most 5 s behind events in flight."""
    harness = SenderHarness()
    backend, queue, waits = harness.backend, [], []
    harness.transport.on_frame = queue.append

    def digest():
        while True:
            if not queue:
                backend.sleep(0.01)
                continue
            frame = queue.pop(0)
            if frame["type"] == "command_result":
                waits.append(backend.now() - asked[int(frame["id"].removeprefix("c-"))])
            else:
                backend.sleep(len(frame["payload"]["events"]) / 100)
                harness.sender.on_ack(frame["id"])

    backend.spawn(digest, name="brain")
    harness.store(6000)
    asked = {}
    for _ in range(12):
        backend.advance(5)
        asked[harness.rows_stored] = backend.now()
        harness.store(1, kind="result")
    backend.advance(30)
    assert harness.buffered() == 0
    assert sorted(harness.transport.event_numbers()) == list(range(6000))
    assert len(waits) == 12
    assert max(waits[2:]) < 5, "the window adapts during the first two"


def test_ack_timeout_resends_everything(harness):
    """After 90 s without an ack all unacknowledged rows are sent again in new frames."""
    harness.store(10)
    harness.backend.advance(ACK_DEADLINE - 1)
    assert harness.transport.event_numbers() == list(range(10))
    harness.backend.advance(4)
    assert harness.transport.event_numbers() == list(range(10)) * 2
    first, second = (
        frame for frame in harness.transport.frames("event_batch") if frame["payload"]["events"]
    )
    assert first["id"] != second["id"]
    harness.sender.on_ack(second["id"])
    harness.backend.advance(3)
    assert harness.buffered() == 0


def test_no_resend_while_acks_arrive(harness):
    """A slow brain gets nothing twice, however long the last frame waits for its ack."""
    harness.store(3000)
    harness.backend.advance(1)
    while harness.acked_frames < len(harness.transport.frames("event_batch")):
        harness.backend.advance(60)
        harness.ack(len(harness.transport.frames("event_batch")) - harness.acked_frames)
        harness.backend.advance(ACK_PAUSE)
    harness.backend.advance(5)
    assert harness.transport.event_numbers() == list(range(3000))
    assert harness.buffered() == 0


def test_late_ack_after_resend_is_ignored(harness):
    """An ack of a frame that was sent again deletes no row and does not stop the loop."""
    harness.store(5)
    harness.backend.advance(ACK_DEADLINE + 3)
    first, second = (
        frame for frame in harness.transport.frames("event_batch") if frame["payload"]["events"]
    )
    harness.sender.on_ack(first["id"])
    harness.backend.advance(2)
    assert harness.buffered() == 5
    harness.sender.on_ack(second["id"])
    harness.backend.advance(2)
    assert harness.buffered() == 0


def test_next_session_resends_unacked_events(harness):
    """The next session first sends what was not acknowledged, in order."""
    harness.store(700)
    harness.backend.advance(1)
    harness.ack()
    harness.backend.advance(1.5)
    harness.connection.close()
    harness.backend.advance(1)
    assert not harness.sender_task.alive()
    harness.start_session()
    harness.ack_immediately()
    harness.store(1)
    harness.backend.advance(3)
    assert harness.transport.event_numbers() == list(range(FRAME_EVENTS_INITIAL, 701))


def test_sender_ends_when_send_fails(harness):
    """A send that fails ends the loop and loses no row."""
    harness.end_session()
    harness.reconnect()
    harness.transport.send_error = NetworkError("reset")
    ended = harness.run_loop(lambda: harness.sender.run(harness.connection))
    harness.store(3)
    harness.backend.advance(2)
    assert [type(error) for error in ended] == [NetworkError]
    assert harness.buffered() == 3


def test_disk_failure_loses_no_event(harness):
    """Events are sent from memory while the disk fails, and from the disk afterwards.

    Row ids restart at each change between disk and memory, so an ack must not apply to the other.
    """
    harness.store(30)
    harness.backend.advance(1)
    harness.disk.full = True
    harness.store(20)
    harness.backend.advance(POLL_BUSY + 0.1)
    assert not harness.buffer.durable
    assert harness.buffer.generation == 1
    assert set(harness.transport.event_numbers()) == set(range(50))
    newest = harness.transport.frames("event_batch")[-1]
    harness.disk.full = False
    harness.backend.advance(3)
    harness.sender.on_ack(newest["id"])
    harness.backend.advance(4)
    assert harness.buffer.durable
    assert harness.disk.store.stats().rows >= 30, (
        "an ack of rows in memory must not delete rows on disk"
    )
    harness.ack_immediately()
    harness.backend.advance(ACK_DEADLINE + 5)
    assert set(harness.transport.event_numbers()) == set(range(50))
    assert harness.buffered() == 0


def test_undeleted_acked_rows_are_not_counted(harness):
    """Acked rows that were not deleted before the disk failed do not count: they are resent."""
    harness.store(5)
    harness.backend.advance(0.5)
    harness.ack()
    harness.disk.full = True
    harness.store(20, wake=False)
    assert harness.buffer.generation == 1
    assert harness.buffer.acked_events == 0


def test_ack_of_old_store_deletes_nothing_in_new_one(harness):
    """An ack that arrives after the disk has failed deletes nothing from memory."""
    harness.store(5)
    harness.backend.advance(1)
    old = harness.transport.frames("event_batch")[0]
    harness.disk.full = True
    harness.store(5)
    harness.sender.on_ack(old["id"])
    harness.backend.advance(3)
    assert harness.buffer.stats().rows == 10, "five in memory, and five that wait on the disk"


# -- poison rows


class PoisonedBrain:
    """Ends the session over a frame with a poison row, and acknowledges all other frames.

    ``session_errors`` holds the errors that the sender reported for the ended sessions.
    """

    def __init__(self, harness, poison, *, code=1011, fails_always=False):
        self.harness = harness
        self.poison = set(poison)
        self.code = code
        self.fails_always = fails_always
        self.arrived = []
        self.session_errors = []
        self.new_session()

    def new_session(self):
        self.ended = False
        self.harness.transport.on_frame = self.on_frame

    def on_frame(self, frame):
        if self.ended:
            return
        if frame["type"] == "command_result":
            rows = [int(frame["id"].removeprefix("c-"))]
        else:
            rows = [event["n"] for event in frame["payload"]["events"]]
        self.ended = self.fails_always or not self.poison.isdisjoint(rows)
        if not self.ended:
            self.arrived += rows
            if frame["type"] == "event_batch":
                self.harness.sender.on_ack(frame["id"])

    def run_session(self, seconds=5.0):
        """Advance time; if the session ended, start the next one. Return whether it ended."""
        self.harness.backend.advance(seconds)
        if not self.ended:
            return False
        self.harness.connection.close()
        self.harness.backend.advance(0.1)
        self.session_errors.append(
            self.harness.sender.on_session_error(
                self.harness.connection, NetworkError("the brain failed on a frame", code=self.code)
            )
        )
        self.harness.start_session()
        self.new_session()
        return True


def test_poison_event_is_dropped(harness, caplog):
    """One poison event among 900 costs six sessions; the log names it without its data."""
    event = {
        "n": 400,
        "kind": "task.failed",
        "engine": "celery",
        "task_id": "t-400",
        "data": {"password": "hunter2"},
    }
    harness.store(400, wake=False)
    harness.buffer.append([("event", "", json.dumps(event).encode())])
    harness.rows_stored += 1
    harness.store(499)
    brain = PoisonedBrain(harness, {400})
    while brain.run_session():
        assert len(brain.session_errors) < 20
    assert sorted(set(brain.arrived)) == [number for number in range(900) if number != 400]
    kinds = [type(error) for error in brain.session_errors]
    assert kinds[:2] == [NetworkError] * 2
    assert set(kinds[2:]) == {PoisonRowError}
    assert len(kinds) <= 6
    stats = harness.buffer.stats()
    assert (stats.rows, stats.lost, stats.produced) == (0, {"poison": 1}, stats.confirmed + 1)
    (line,) = [
        record.getMessage() for record in caplog.records if "cannot accept" in record.getMessage()
    ]
    assert "a 'task.failed' of 'celery', task 't-400', 106 bytes" in line
    assert "hunter2" not in line


def test_poison_result_is_dropped(harness, caplog):
    """A poison result is dropped as an event is; all other rows arrive."""
    harness.store(30, wake=False)
    harness.store(3, kind="result")
    brain = PoisonedBrain(harness, {31}, code=4400)
    while brain.run_session():
        assert len(brain.session_errors) < 20
    assert sorted(set(brain.arrived)) == [number for number in range(33) if number != 31]
    assert len(brain.session_errors) == 3
    stats = harness.buffer.stats()
    assert (stats.rows, stats.lost, stats.lost_kinds) == (0, {"poison": 1}, {"result": 1})
    assert "the result of command c-31" in caplog.text


def test_failing_brain_costs_no_row(harness):
    """If every session ends whatever is sent, no row is dropped, and all arrive afterwards."""
    harness.store(300)
    brain = PoisonedBrain(harness, (), fails_always=True)
    for _ in range(50):
        brain.run_session()
    assert harness.buffer.stats().lost == {}
    assert [
        len(frame["payload"]["events"]) for frame in harness.transport.frames("event_batch")
    ] == []
    brain.fails_always = False
    brain.run_session()
    brain.run_session(30)
    assert sorted(brain.arrived) == list(range(300))
    assert harness.buffered() == 0


def test_other_session_errors_mark_no_suspect(harness):
    """A lost connection, a restart and a closing brain do not count against rows in flight."""
    harness.store(10)
    brain = PoisonedBrain(harness, (), fails_always=True)
    for brain.code in (None, 1000, 1001, 1012, 4002, 4408, 4429, 503):
        brain.run_session()
    drained = harness.disk.store.drain(0, 100, 10**6, ("event",))
    assert [entry.attempts for entry in drained] == [0] * 10


def test_isolation_continues_in_adopting_process(harness):
    """The counts are in the store: the process that adopts it continues the search."""
    harness.store(900)
    brain = PoisonedBrain(harness, {7})
    for _ in range(4):
        brain.run_session()
    before = len(brain.session_errors)
    adopting = SenderHarness()
    rows = harness.disk.store.drain(0, 1000, 10**7, ("event",))
    adopting.buffer.run_on_disk(lambda store: store.import_rows(rows))
    adopting.connection.wake.set()
    brain.harness = adopting
    brain.new_session()
    while brain.run_session():
        pass
    assert before == 4
    assert len(brain.session_errors) - before <= 2, "a new search would have taken four"
    assert sorted(set(brain.arrived)) == [number for number in range(900) if number != 7]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 1500),
    st.lists(st.integers(0, 1499), max_size=5),
    st.integers(0, 5),
    st.sampled_from([1011, 4400, 4403]),
)
def test_poison_rows_are_counted_and_others_arrive(events, poison, results, code):
    """Poison rows are lost and counted; all others arrive in a bounded number of sessions."""
    harness = SenderHarness()
    harness.store(events, wake=False)
    harness.store(results, kind="result")
    poison_rows = {number for number in poison if number < harness.rows_stored}
    brain = PoisonedBrain(harness, poison_rows, code=code)
    while brain.run_session(10):
        assert len(brain.session_errors) <= 6 * len(poison_rows)
    assert set(brain.arrived) == set(range(harness.rows_stored)) - poison_rows
    stats = harness.buffer.stats()
    assert (stats.rows, stats.lost.get("poison", 0)) == (0, len(poison_rows))
    assert stats.produced == stats.confirmed + len(poison_rows)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_acks_and_disconnects_lose_nothing(data):
    """With any acks and disconnects every event arrives, the first time in order."""
    harness = SenderHarness()
    received = []
    for _ in range(data.draw(st.integers(1, 6), "sessions")):
        harness.store(data.draw(st.integers(0, 900)))
        if data.draw(st.booleans(), "result"):
            harness.store(1, kind="result")
        harness.backend.advance(data.draw(st.sampled_from([0.1, 1.5, 7.0, 100.0]), "seconds"))
        frames = harness.transport.frames("event_batch")
        for index in (
            data.draw(st.lists(st.integers(0, max(0, len(frames) - 1)), max_size=5), "acks")
            if frames
            else []
        ):
            harness.sender.on_ack(frames[index]["id"])
        harness.backend.advance(1.5)
        received += harness.transport.event_numbers()
        if data.draw(st.booleans(), "break"):
            harness.connection.close()
            harness.backend.advance(2)
            harness.start_session()
        else:
            harness.transport.sent.clear()
    harness.connection.close()
    harness.backend.advance(2)
    harness.start_session()
    harness.ack_immediately()
    harness.connection.wake.set()
    harness.backend.advance(60)
    received += harness.transport.event_numbers()
    firsts = list(dict.fromkeys(received))
    assert firsts == sorted(firsts)
    stats = harness.buffer.stats()
    assert stats.rows == 0
    assert stats.produced == stats.confirmed
    results = harness.rows_stored - len(firsts)
    assert harness.buffer.acked_events + results == stats.produced


class UnreliableBrain:
    """Acknowledges each frame early, late or never, or ends the session.

    ``behaviours`` is used up from its end; after that every frame is acknowledged at once.
    """

    BEHAVIOURS = ("early", "late", "later", "lost", "end")

    def __init__(self, harness, behaviours):
        self.harness = harness
        self.behaviours = list(behaviours)
        self.received = []
        self.new_session()

    def new_session(self):
        self.ended = False
        self.harness.transport.on_frame = self.on_frame

    def on_frame(self, frame):
        if self.ended or frame["type"] != "event_batch":
            return
        self.received += frame["payload"]["events"]
        behaviour = self.behaviours.pop() if self.behaviours else "early"
        if behaviour == "end":
            self.ended = True
        elif behaviour == "early":
            self.harness.sender.on_ack(frame["id"])
        elif behaviour != "lost":
            self.harness.backend.spawn(
                self.ack_later,
                self.harness.sender,
                frame["id"],
                0.3 if behaviour == "late" else 40.0,
                name="ack",
            )

    def ack_later(self, sender, identity, seconds):
        self.harness.backend.sleep(seconds)
        if sender is self.harness.sender and not self.ended:
            sender.acked(identity)

    def run_session(self, seconds, code=None):
        self.harness.backend.advance(seconds)
        if self.ended:
            self.harness.connection.close()
            self.harness.backend.advance(0.1)
            self.harness.sender.on_session_error(
                self.harness.connection, NetworkError("gone", code=code)
            )
            self.harness.start_session()
            self.new_session()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_brain_receives_unchanged_events(data):
    """With any acks each event arrives, in order per task, and unchanged when sent again."""
    harness, events = SenderHarness(), []
    brain = UnreliableBrain(
        harness,
        data.draw(st.lists(st.sampled_from(UnreliableBrain.BEHAVIOURS), max_size=60), "behaviours"),
    )
    for _ in range(data.draw(st.integers(1, 6), "rounds")):
        fresh = [
            {
                "id": f"e-{number}",
                "n": number,
                "occurred_at": f"2026-11-23T10:00:00.{number:06d}+00:00",
                "task_id": f"t-{number % 7}",
            }
            for number in range(len(events), len(events) + data.draw(st.integers(0, 300), "events"))
        ]
        events += fresh
        harness.buffer.append(
            [("event", event["task_id"], json.dumps(event).encode()) for event in fresh]
        )
        harness.connection.wake.set()
        seconds = data.draw(st.sampled_from([0.1, 1.0, 7.0, 95.0]), "seconds")
        brain.run_session(seconds, data.draw(st.sampled_from([None, 1006, 1012, 4408]), "code"))
    brain.behaviours.clear()
    for _ in range(4):  # a session that was dying, and the watchdog for what was never acknowledged
        brain.run_session(ACK_DEADLINE + 5)
    assert {event["n"] for event in brain.received} == set(range(len(events)))
    assert all(event == events[event["n"]] for event in brain.received)
    for task in range(7):
        firsts = list(
            dict.fromkeys(event["n"] for event in brain.received if event["n"] % 7 == task)
        )
        assert firsts == sorted(firsts)
    stats = harness.buffer.stats()
    assert (stats.rows, stats.lost, stats.produced) == (0, {}, stats.confirmed)
