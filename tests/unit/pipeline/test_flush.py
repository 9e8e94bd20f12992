"""Ring to store: the interval, the threshold, the slice, and the books when something goes wrong."""

import json
import time

import pytest

from tests.support.session import SessionHarness
from z4j_bare.concurrency import timeslice as slices
from z4j_bare.events.ring import Ring
from z4j_bare.pipeline import flush


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """The slice is in real seconds: here a busy machine must not make virtual time go on in the middle of a batch."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", 1e9)


class Flushing(SessionHarness):
    """A world with a ring and a running flush loop."""

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
        """Produced against everything it may have become."""
        return self.ring.produced, len(
            self.ring
        ) + self.ring.lost + self.counters.unencodable + self.counters.stored


def encode(captured):
    return b'{"n":%d}' % captured[1]


@pytest.fixture
def world():
    return Flushing()


def test_flushes_within_the_interval(world):
    """What was captured is on disk 200 ms later: that is all that a SIGKILL may take."""
    world.backend.advance(1)
    world.put(10)
    world.backend.advance(0.2)
    assert world.numbers() == list(range(10))
    assert len(world.woken) == 1, "the sender is told"


def test_the_figures_follow_a_last_burst(world):
    """Without a session nobody asks for rows: what was stored right after the last look is counted once all is quiet."""
    world.backend.advance(1)
    world.put(1)
    world.backend.advance(0.3)
    world.put(10)
    world.backend.advance(0.3)
    assert world.buffer.last_stats.rows < 11
    world.backend.advance(2 * flush.IDLE_WAIT)
    assert world.buffer.last_stats.rows == 11


def test_the_threshold_does_not_wait(world):
    """A full batch is flushed at once, without waiting for the interval."""
    world.backend.advance(1)
    world.put(255)
    world.backend.advance(0.001)
    assert world.numbers() == []
    world.put(1)
    world.backend.advance(0.001)
    assert len(world.numbers()) == 256


def test_a_few_more_wait_for_company(world):
    """What a full batch has left over does not go to the store by itself, but with what comes within the interval."""
    world.backend.advance(1)
    world.put(260)
    world.backend.advance(0.001)
    assert len(world.numbers()) == 256
    world.put(6)
    world.backend.advance(0.2)
    assert world.numbers() == list(range(266))
    assert len(world.woken) == 2


def test_an_idle_loop_sleeps(world):
    """With nothing captured the loop hardly wakes, and the first event after a long rest is still stored in time."""
    world.backend.advance(60)
    assert world.backend.steps.count <= 15
    world.put(1)
    world.backend.advance(0.2)
    assert world.numbers() == [0]


def test_batches_are_bounded_and_ordered(world):
    """A burst goes to the store in several transactions of bounded size, in order."""
    world.put(2000)
    world.backend.advance(0.3)
    assert world.numbers() == list(range(2000))
    assert len(world.woken) == 8


def test_flush_from_several_tasks_keeps_order(world):
    """stop() flushes beside the loop: order holds and nothing is stored twice."""
    world.put(1000)
    tasks = [world.backend.spawn(world.flusher.flush, name="f") for _ in range(3)]
    world.backend.advance(1)
    assert not any(task.alive() for task in tasks)
    assert world.numbers() == list(range(1000))


def test_an_event_that_cannot_be_encoded_is_counted(world):
    """One event whose encoding fails costs itself and is counted; the others get through."""
    world.put(3)
    world.ring.put((lambda _captured: 1 / 0,))
    world.put(3)
    world.backend.advance(1)
    assert world.numbers() == [0, 1, 2, 3, 4, 5]
    assert world.counters.unencodable == 1
    assert world.balance() == (7, 7)


def test_encoding_yields(world, monkeypatch):
    """Encoding that takes long lets others run in between: it happens on the host's only thread."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0.002)
    ran = []

    def slow(captured):
        began = time.perf_counter()
        while time.perf_counter() - began < 0.003:
            pass
        return encode(captured)

    for number in range(10):
        world.ring.put((slow, number))
    world.backend.spawn(
        lambda: [ran.append(len(world.numbers())) or world.backend.sleep(0) for _ in range(5)],
        name="other",
    )
    world.backend.advance(1)
    assert ran[:2] == [0, 0], "it ran while the batch was still being encoded"
    assert len(world.numbers()) == 10


def test_overflow_is_counted():
    """A ring that overflows loses its oldest and counts them: produced = stored + waiting + lost, at every moment."""
    world = Flushing(limit=100, most=50)
    for turn in range(50):
        world.put(turn * 7 % 180)
        assert world.balance()[0] == world.balance()[1]
        if turn % 3 == 0:
            world.backend.advance(0.2)
            assert world.balance()[0] == world.balance()[1]
    world.backend.advance(1)
    assert world.ring.lost > 0
    assert world.balance() == (world.rows_stored, world.rows_stored)
    assert world.numbers() == sorted(world.numbers())
    assert world.numbers()[-1] == world.rows_stored - 1, "the newest survive"


def test_a_failing_disk_loses_nothing(world):
    """A disk that fails in the middle costs no event: they go to memory and return to the disk."""
    world.put(10)
    world.backend.advance(1)
    world.disk.full = True
    world.put(10)
    world.backend.advance(1)
    assert world.numbers() == list(range(10, 20))
    world.disk.full = False
    world.backend.advance(10)
    world.put(1)
    world.backend.advance(1)
    assert world.buffer.durable
    assert sorted(world.numbers()) == list(range(21))
    assert world.balance() == (21, 21)


def test_an_unexpected_error_is_counted_not_hidden(world, caplog):
    """A store that breaks its contract ends the loop loudly; the batch in hand goes back, and is stored after the restart."""
    world.backend.advance(0.1)
    append, world.disk.store.append = world.disk.store.append, None
    world.put(2)
    world.ring.put((lambda _captured: 1 / 0,))
    world.put(2)
    world.backend.advance(1)
    assert "z4j-flush" in caplog.text
    assert world.balance() == (5, 5)
    world.disk.store.append = append
    world.put(1)
    world.flusher.flush()
    assert world.numbers() == [0, 1, 2, 3, 4]
    assert world.balance() == (6, 6)
    assert world.counters.unencodable == 1


def test_what_finds_no_room_on_its_way_back_is_lost():
    """A batch that comes back to a full ring gives way, oldest first, and is counted."""
    world = Flushing(limit=10, most=8)
    world.put(8)
    batch = world.ring.take(8)
    world.put(7)
    world.ring.requeue(batch)
    assert (world.ring.produced, len(world.ring), world.ring.lost) == (15, 10, 5)
    assert [event for _, event in world.ring.take(99)] == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def test_stop_ends_the_loop(world):
    """The loop ends at its next wake after stopping is set."""
    world.stop_event.set()
    world.ring.wake.set()
    world.backend.advance(1)
    assert not world.task.alive()


def test_the_ring_keeps_count_between_threads(backend):
    """Natively threaded producers lose no count: what is in the ring or fell off it adds up."""
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


def test_a_flush_that_is_cut_short_encodes_nothing_twice(world):
    """What a kill leaves of a batch goes back in its order, and what was encoded is not encoded again: a stamp is given once."""
    calls = []

    class Killed(BaseException):
        pass

    def once(captured):
        calls.append(captured[1])
        if calls == [0, 1, 2]:
            raise Killed
        return encode(captured)

    world.backend.advance(0.1)
    for number in range(5):
        world.ring.put((once, number))
    with pytest.raises(Killed):
        world.flusher.flush()
    assert world.balance() == (5, 5)
    world.flusher.flush()
    assert world.numbers() == list(range(5))
    assert calls == [0, 1, 2, 2, 3, 4]
