"""Ring to store: interval, threshold, time slices, and the accounting of lost events."""

import json
import time

import pytest

from tests.support.session import SessionHarness
from z4j_bare.concurrency import timeslice as slices
from z4j_bare.events.ring import Ring
from z4j_bare.pipeline import flush


@pytest.fixture(autouse=True)
def no_time_slices(monkeypatch):
    """Time slices use real seconds: on a busy machine they would advance virtual time mid-batch."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", 1e9)


class FlushHarness(SessionHarness):
    """A session harness with a ring and a running flush loop."""

    def __init__(self, limit=10_000, most=256, interval=0.2):
        super().__init__()
        self.ring = Ring(limit, most, self.backend.event())
        self.stop_event = self.backend.event()
        self.woken = []
        self.sender.on_stored = lambda _: self.woken.append(self.backend.now())
        self.flusher = flush.FlushLoop(
            self.ring,
            self.buffer,
            self.sender,
            self.backend,
            self.counters,
            interval=interval,
            max_events=most,
        )
        self.task = self.backend.spawn(self.flusher.run, self.stop_event, name="z4j-flush")

    def put(self, number):
        for _ in range(number):
            self.ring.put((encode, self.rows_stored))
            self.rows_stored += 1

    def numbers(self):
        return [
            json.loads(row.payload)["n"]
            for row in self.buffer.read_next((0, 0, ()), (0, 100_000, ("event",)), 1 << 30)[1]
        ]

    def balance(self):
        """Return the produced events, and the sum of what became of them."""
        return self.ring.produced, len(
            self.ring
        ) + self.ring.lost + self.counters.unencodable + self.counters.stored


def encode(captured):
    return b'{"n":%d}' % captured[1]


@pytest.fixture
def harness():
    return FlushHarness()


def test_events_are_stored_within_flush_interval(harness):
    """Events are on disk 200 ms after their capture: SIGKILL loses no more than that."""
    harness.backend.advance(1)
    harness.put(10)
    harness.backend.advance(0.2)
    assert harness.numbers() == list(range(10))
    assert len(harness.woken) == 1, "the sender is told"


def test_stats_are_refreshed_when_ring_is_idle(harness):
    """Without a session nobody reads rows, so the stats of a last burst are refreshed when idle."""
    harness.backend.advance(1)
    harness.put(1)
    harness.backend.advance(0.3)
    harness.put(10)
    harness.backend.advance(0.3)
    assert harness.buffer.last_stats.rows < 11
    harness.backend.advance(2 * flush.IDLE_WAIT)
    assert harness.buffer.last_stats.rows == 11


def test_full_batch_is_stored_immediately(harness):
    """A full batch is stored at once, without waiting for the interval."""
    harness.backend.advance(1)
    harness.put(255)
    harness.backend.advance(0.001)
    assert harness.numbers() == []
    harness.put(1)
    harness.backend.advance(0.001)
    assert len(harness.numbers()) == 256


def test_remainder_of_full_batch_waits_for_interval(harness):
    """Events beyond a full batch are stored with those that arrive within the interval."""
    harness.backend.advance(1)
    harness.put(260)
    harness.backend.advance(0.001)
    assert len(harness.numbers()) == 256
    harness.put(6)
    harness.backend.advance(0.2)
    assert harness.numbers() == list(range(266))
    assert len(harness.woken) == 2


def test_idle_loop_hardly_wakes(harness):
    """An idle loop hardly wakes, and stores the first event after a long silence in time."""
    harness.backend.advance(60)
    assert harness.backend.steps.count <= 15
    harness.put(1)
    harness.backend.advance(0.2)
    assert harness.numbers() == [0]


def test_batches_are_bounded_and_ordered(harness):
    """A burst goes to the store in order, in several transactions of bounded size."""
    harness.put(2000)
    harness.backend.advance(0.3)
    assert harness.numbers() == list(range(2000))
    assert len(harness.woken) == 8


def test_concurrent_flushes_keep_order(harness):
    """Several flushes at once keep the order and store no event twice."""
    harness.put(1000)
    tasks = [harness.backend.spawn(harness.flusher.flush, name="f") for _ in range(3)]
    harness.backend.advance(1)
    assert not any(task.alive() for task in tasks)
    assert harness.numbers() == list(range(1000))


def test_unencodable_event_is_counted(harness):
    """An event that cannot be encoded is lost and counted; the others are stored."""
    harness.put(3)
    harness.ring.put((lambda _captured: 1 / 0,))
    harness.put(3)
    harness.backend.advance(1)
    assert harness.numbers() == [0, 1, 2, 3, 4, 5]
    assert harness.counters.unencodable == 1
    assert harness.balance() == (7, 7)


def test_slow_encoding_yields(harness, monkeypatch):
    """Slow encoding yields in between, because it runs on the host's only thread."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0.002)
    ran = []

    def slow(captured):
        began = time.perf_counter()
        while time.perf_counter() - began < 0.003:
            pass
        return encode(captured)

    for number in range(10):
        harness.ring.put((slow, number))
    harness.backend.spawn(
        lambda: [ran.append(len(harness.numbers())) or harness.backend.sleep(0) for _ in range(5)],
        name="other",
    )
    harness.backend.advance(1)
    assert ran[:2] == [0, 0], "it ran while the batch was still being encoded"
    assert len(harness.numbers()) == 10


def test_ring_overflow_is_counted():
    """A full ring drops its oldest events; produced = stored + waiting + lost at every moment."""
    harness = FlushHarness(limit=100, most=50)
    for turn in range(50):
        harness.put(turn * 7 % 180)
        assert harness.balance()[0] == harness.balance()[1]
        if turn % 3 == 0:
            harness.backend.advance(0.2)
            assert harness.balance()[0] == harness.balance()[1]
    harness.backend.advance(1)
    assert harness.ring.lost > 0
    assert harness.balance() == (harness.rows_stored, harness.rows_stored)
    assert harness.numbers() == sorted(harness.numbers())
    assert harness.numbers()[-1] == harness.rows_stored - 1, "the newest survive"


def test_failing_disk_loses_no_event(harness):
    """Events are stored in memory while the disk fails, and return to the disk afterwards."""
    harness.put(10)
    harness.backend.advance(1)
    harness.disk.full = True
    harness.put(10)
    harness.backend.advance(1)
    assert harness.numbers() == list(range(10, 20))
    harness.disk.full = False
    harness.backend.advance(10)
    harness.put(1)
    harness.backend.advance(1)
    assert harness.buffer.durable
    assert sorted(harness.numbers()) == list(range(21))
    assert harness.balance() == (21, 21)


def test_unexpected_error_requeues_batch(harness, caplog):
    """An unexpected store error ends the loop; its batch is requeued and stored later."""
    harness.backend.advance(0.1)
    append, harness.disk.store.append = harness.disk.store.append, None
    harness.put(2)
    harness.ring.put((lambda _captured: 1 / 0,))
    harness.put(2)
    harness.backend.advance(1)
    assert "z4j-flush" in caplog.text
    assert harness.balance() == (5, 5)
    harness.disk.store.append = append
    harness.put(1)
    harness.flusher.flush()
    assert harness.numbers() == [0, 1, 2, 3, 4]
    assert harness.balance() == (6, 6)
    assert harness.counters.unencodable == 1


def test_requeue_into_full_ring_drops_oldest():
    """A batch requeued into a full ring loses its oldest events, and they are counted."""
    harness = FlushHarness(limit=10, most=8)
    harness.put(8)
    batch = harness.ring.take(8)
    harness.put(7)
    harness.ring.requeue(batch)
    assert (harness.ring.produced, len(harness.ring), harness.ring.lost) == (15, 10, 5)
    assert [event for _, event in harness.ring.take(99)] == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def test_stop_event_ends_loop(harness):
    """The loop ends at its next wake-up after ``stop_event`` is set."""
    harness.stop_event.set()
    harness.ring.wake.set()
    harness.backend.advance(1)
    assert not harness.task.alive()


def test_ring_counts_events_of_native_threads(backend):
    """With producers in native threads, waiting plus lost events equal the produced ones."""
    ring = Ring(1000, 10**9, backend.event())

    def produce():
        for number in range(2000):
            ring.put((encode, number))
            if not number % 100:
                backend.sleep(0)

    tasks = [backend.spawn(produce, name="p") for _ in range(4)]
    assert all(task.join(20) for task in tasks)
    assert len(ring) == 1000
    ring.put((encode, 0))
    assert (ring.produced, ring.lost) == (8001, 7001)
    assert len(ring.take(5000)) == 1000
    assert ring.take(5) == []
    assert ring.lost == 7001


def test_interrupted_flush_encodes_each_event_once(harness):
    """A killed flush requeues its batch in order; encoded events are not encoded again."""
    calls = []

    class Killed(BaseException):
        pass

    def once(captured):
        calls.append(captured[1])
        if calls == [0, 1, 2]:
            raise Killed
        return encode(captured)

    harness.backend.advance(0.1)
    for number in range(5):
        harness.ring.put((once, number))
    with pytest.raises(Killed):
        harness.flusher.flush()
    assert harness.balance() == (5, 5)
    harness.flusher.flush()
    assert harness.numbers() == list(range(5))
    assert calls == [0, 1, 2, 2, 3, 4]


class RecordedRuns:
    """Records up to which event the ends are stored."""

    def __init__(self):
        self.calls = []

    def stored(self, number, at):
        self.calls.append((number, at))


def test_flush_reports_stored_position_to_open_runs(harness):
    """After a commit the ends of runs up to its last event are stored, at the time of the take."""
    harness.ring.runs = RecordedRuns()
    harness.backend.advance(1)
    harness.put(300)
    harness.backend.advance(1)
    assert [number for number, _ in harness.ring.runs.calls] == [256, 300]
    assert all(at <= harness.backend.wall() for _, at in harness.ring.runs.calls)


def test_ends_in_memory_are_not_stored(harness, monkeypatch):
    """While the disk is failed, the ends of runs stay where a SIGKILL does not reach them."""
    harness.ring.runs = RecordedRuns()
    monkeypatch.setattr(type(harness.buffer), "durable", property(lambda _: False))
    harness.backend.advance(1)
    harness.put(10)
    harness.backend.advance(1)
    assert len(harness.numbers()) == 10
    assert harness.ring.runs.calls == []
