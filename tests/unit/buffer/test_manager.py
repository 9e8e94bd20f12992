"""The keeper in virtual time: patience with a busy disk, a remedy for an ill one, and the books while there is none."""

import errno
import logging
import sqlite3

import pytest

from z4j_bare.buffer import manager as module
from z4j_bare.buffer.errors import BUSY, CORRUPT, DELETED, FULL, classify
from z4j_bare.buffer.maintenance import MAX_DEFER_SECONDS, RETRY_INITIAL, RETRY_MAX, VACUUM_INTERVAL
from z4j_bare.buffer.manager import BUSY_TIMEOUT, BufferManager
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.buffer.rows import NO_STATS
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import LocalStorageError

CODES = {
    BUSY: sqlite3.SQLITE_BUSY,
    FULL: sqlite3.SQLITE_FULL,
    CORRUPT: sqlite3.SQLITE_CORRUPT,
    DELETED: None,
}
NOTHING = ((0, 0, ()), (0, 1, ("event",)), 1)


def trouble(cause):
    """A storage error as the store raises it."""
    if cause == DELETED:
        root = OSError(errno.ENOENT, "No such file or directory")
    elif CODES.get(cause):
        root = sqlite3.OperationalError(cause)
        root.sqlite_errorcode = CODES[cause]
    else:
        root = sqlite3.OperationalError("disk I/O error")
    error = LocalStorageError(f"cannot append to the store: {cause}")
    error.__cause__ = root
    return error


class Ill(MemoryStore):
    """A store that can be made to fail, and remembers what was done to it."""

    def __init__(self, world):
        super().__init__()
        self.world = world
        self.done = []
        self.untidy = 0

    def append(self, rows):
        self.world.strike()
        return super().append(rows)

    def import_rows(self, rows):
        self.world.strike()
        return super().import_rows(rows)

    def free_space(self):
        self.done.append("free_space")
        self.world.cured += 1
        ids = [row.id for row in self.drain(0, 2, 1 << 20, ("event",))]
        return self.discard(ids, "capacity")

    def state_if_abandoned(self):
        left = self.export_state()
        left.losses["corrupt", "event"] = self.size()
        return left

    def quarantine(self):
        self.done.append("set aside")
        self.close()

    def vacuum_step(self):
        self.done.append("vacuum_step")
        self.untidy = max(0, self.untidy - 1)
        return not self.untidy


class World:
    """A keeper over ill stores: ``cause`` is what ails them, ``strikes`` how many calls it takes."""

    def __init__(self):
        self.backend = FakeConcurrency()
        self.stores = []
        self.cause, self.strikes, self.cured, self.calls = "", 0, 0, 0
        self.buffer = BufferManager(self.open, self.backend)
        self.sent = 0

    def open(self):
        self.stores.append(Ill(self))
        return self.stores[-1]

    def strike(self):
        self.calls += 1
        if self.strikes > 0:
            self.strikes -= 1
            raise trouble(self.cause)

    def ail(self, cause, strikes=10**9):
        self.cause, self.strikes = cause, strikes

    def heal(self):
        self.strikes = 0

    def put(self, number):
        self.buffer.append([("event", "", b"%d" % (self.sent + n)) for n in range(number)])
        self.sent += number

    def there(self):
        """What a sender would find now."""
        return [
            int(row.payload)
            for row in self.buffer.read_next((0, 0, ()), (0, 10**6, ("event",)), 1 << 30)[1]
        ]

    def adds_up(self):
        stats = self.buffer.stats()
        assert sum(stats.lost.values()) == sum(stats.lost_kinds.values())
        return self.sent == stats.rows + sum(stats.lost.values()) + stats.confirmed


@pytest.fixture
def world():
    return World()


@pytest.mark.parametrize("cause", sorted(CODES))
def test_error_has_expected_cause(cause):
    """The errors of this module have the causes that the manager recovers from."""
    assert classify(trouble(cause)) == cause


def test_cached_rows_need_no_disk_call(world, monkeypatch):
    """Recent rows are read on the hub; the disk is called for due stats or pending deletes."""
    world.put(3)
    trips, offload = [], world.backend.offload
    monkeypatch.setattr(
        world.backend, "offload", lambda *call: trips.append(call) or offload(*call)
    )
    assert (world.there(), trips) == ([0, 1, 2], [])
    world.backend.advance(1.5 * module.STATS_INTERVAL)
    assert (world.there(), len(trips)) == ([0, 1, 2], 0), "not for the figures' sake alone"
    world.backend.advance(module.STATS_INTERVAL_IDLE)
    assert (world.there(), len(trips)) == ([0, 1, 2], 1)
    world.buffer.ack((1, 2, 3), 3, 0)
    assert (world.there(), len(trips)) == ([], 2)


def test_acked_rows_are_deleted_by_next_call(world, monkeypatch):
    """A read of cached rows or results defers the delete; an append or an empty read does not."""
    world.put(4)
    trips, offload = [], world.backend.offload
    monkeypatch.setattr(
        world.backend, "offload", lambda *call: trips.append(call) or offload(*call)
    )
    world.buffer.ack((1,), 1, 0)
    found = world.buffer.read_next((0, 0, ()), (1, 10, ("event",)), 1 << 30)[1]
    assert ([row.id for row in found], world.buffer.acked_events, trips) == ([2, 3, 4], 0, [])
    assert not world.buffer.is_idle
    world.put(1)
    assert (world.buffer.acked_events, len(trips)) == (1, 1)
    world.buffer.ack((2,), 1, 0)
    assert world.buffer.read_next((0, 10, ("result",)), (2, 0, ("event",)), 1 << 30) == ([], [])
    assert (world.buffer.acked_events, len(trips)) == (1, 1), (
        "who may send no events will be back soon"
    )
    world.backend.advance(MAX_DEFER_SECONDS)
    assert world.buffer.read_next((0, 0, ()), (2, 10, ("event",)), 1 << 30)[1]
    assert (world.buffer.acked_events, len(trips)) == (2, 2)
    world.buffer.ack((3, 4, 5), 3, 0)
    assert world.buffer.read_next((0, 0, ()), (5, 10, ("event",)), 1 << 30) == ([], [])
    assert (world.buffer.acked_events, world.buffer.last_stats.lost) == (5, {})


def test_manager_is_idle_after_vacuum(world):
    """After a delete, the manager is idle once an empty read has completed the vacuum."""
    world.put(1)
    world.buffer.ack((1,), 1, 0)
    nothing = ((0, 0, ()), (1, 10, ("event",)), 1 << 30)
    assert world.buffer.read_next(*nothing) == ([], [])
    assert (world.buffer.acked_events, world.buffer.is_idle) == (1, False)
    world.backend.advance(VACUUM_INTERVAL)
    assert world.buffer.read_next(*nothing) == ([], [])
    assert world.buffer.is_idle


def test_acked_rows_are_not_read_again(world):
    """A sender that restarts does not get acked rows, although they are still cached."""
    world.put(3)
    world.buffer.ack((1, 2), 2, 0)
    assert world.there() == [2]


@pytest.mark.parametrize(
    "add",
    [
        BufferManager.append,
        lambda buffer, rows: buffer.append_events([payload for _, _, payload in rows]),
    ],
)
def test_full_store_deletes_acked_rows_before_eviction(world, add):
    """Acked rows are deleted before the caps apply; an eviction would count them as lost."""
    world.buffer._disk._open_store = lambda: MemoryStore(max_rows=10)
    rows = [("event", "", b"%d" % number) for number in range(10)]
    add(world.buffer, rows)
    world.buffer.ack(range(1, 8), 7, 0)
    add(world.buffer, rows[:7])
    stats = world.buffer.stats()
    assert (stats.rows, stats.confirmed, stats.lost, world.buffer.acked_events) == (10, 7, {}, 7)


def test_acked_row_is_counted_once_on_busy_disk(world):
    """While the disk is busy, the delete is repeated with its call, and each row counts once."""
    world.put(3)
    world.buffer.ack((1, 2), 2, 0)
    world.ail(BUSY, 2)
    world.put(1)
    assert (world.buffer.acked_events, world.buffer.stats().confirmed) == (2, 2)
    assert world.adds_up()


def test_acks_of_memory_do_not_delete_disk_rows(world):
    """Ids of rows in memory belong to other rows on the disk."""
    world.put(3)
    world.ail("other")
    world.put(2)
    world.heal()
    world.buffer.ack((1, 2), 2, world.buffer.generation)
    world.backend.advance(RETRY_INITIAL)
    assert world.there() == [0, 1, 2, 3, 4]
    assert world.buffer.durable
    assert world.adds_up()


def test_close_deletes_acked_rows(world):
    """The next process does not send them again."""
    world.put(3)
    deleted = []
    world.stores[0].confirm = lambda ids: deleted.extend(ids)
    world.buffer.ack((1, 3), 2, 0)
    world.buffer.close()
    assert (deleted, world.buffer.acked_events) == ([1, 3], 2)


# -- busy


def test_busy_disk_is_retried(world):
    """A disk that is locked for a second delays the call by that second and has no other effect."""
    world.ail(BUSY, 4)
    world.put(3)
    assert 0 < world.backend.now() < 1.5
    assert (world.buffer.durable, world.buffer.failures, world.buffer.generation) == (True, 0, 0)
    assert world.there() == [0, 1, 2]


def test_busy_disk_times_out(world):
    """A disk that stays locked is replaced after some seconds, in which other tasks run."""
    ticks = []
    world.backend.spawn(
        lambda: [ticks.append(world.backend.now()) or world.backend.sleep(0.1) for _ in range(20)],
        name="host",
    )
    world.ail(BUSY)
    world.put(1)
    assert BUSY_TIMEOUT <= world.backend.now() <= BUSY_TIMEOUT + 1
    assert len(ticks) == 20
    assert not world.buffer.durable
    assert world.adds_up()


# -- full, corrupt, gone


def test_full_disk_evicts_oldest_events(world, caplog):
    """Space is freed once and the call repeated; the loss is counted and logged once a minute."""
    world.put(4)
    for _ in range(3):
        world.ail(FULL, 1)
        world.put(2)
    assert world.buffer.durable
    assert world.stores[0].done.count("free_space") == 3
    assert world.there() == [6, 7, 8, 9]
    assert world.buffer.stats().lost == {"capacity": 6}
    assert world.adds_up()
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ] == [
        "z4j: the disk is full: the 2 oldest events were dropped "
        "(cannot append to the store: full); free some space"
    ]


def test_disk_that_stays_full_switches_to_memory(world):
    """When freeing space does not help, rows go to memory, and no more are evicted."""
    world.put(4)
    world.ail(FULL)
    world.put(2)
    assert world.stores[0].done == ["free_space"]
    assert not world.buffer.durable
    assert world.adds_up()
    assert world.buffer.last_stats.rows == 4


def test_corrupt_file_is_quarantined_and_replaced(world, caplog):
    """The rows of the old file count as lost, and ids of the old generation are ignored."""
    world.put(5)
    generation = world.buffer.generation
    world.ail(CORRUPT, 1)
    world.put(2)
    assert world.stores[0].done == ["set aside"]
    assert len(world.stores) == 2
    assert world.buffer.durable
    assert world.buffer.generation == generation + 1
    world.buffer.ack([1, 2], 2, generation)
    world.buffer.read_next(*NOTHING)
    world.buffer.discard([1, 2], "poison", generation)
    assert world.there() == [5, 6]
    assert world.buffer.stats().lost == {"corrupt": 5}
    assert world.adds_up()
    assert caplog.text.count("is corrupt") == 1


def test_losses_of_corrupt_file_are_reported_from_memory(world):
    """After a corrupt file and a failed disk, memory and then the next file report the losses."""
    world.put(5)
    opened = world.buffer._disk._open_store

    def refuse():
        raise trouble("other")

    world.buffer._disk._open_store = refuse
    world.ail(CORRUPT, 1)
    world.put(2)
    assert not world.buffer.durable
    assert world.buffer.stats().lost == {"corrupt": 5}
    assert world.adds_up()
    world.buffer._disk._open_store = opened
    world.backend.advance(RETRY_INITIAL)
    assert world.there() == [5, 6]
    assert world.buffer.stats().lost == {"corrupt": 5}
    assert world.adds_up()


def test_rows_of_deleted_file_are_copied(world):
    """The rows of a deleted file would vanish with the process, so a new file gets them."""
    world.put(5)
    world.ail(DELETED, 1)
    world.put(2)
    assert world.stores[0].closed
    assert world.there() == [0, 1, 2, 3, 4, 5, 6]
    assert world.buffer.durable
    assert world.adds_up()


# -- memory and back


def test_losses_in_memory_are_recorded_on_disk(world):
    """Rows that memory evicted are still reported as lost after the return to the disk."""
    world.buffer._new_memory = lambda: MemoryStore(max_rows=3)
    world.put(2)
    world.ail("other")
    world.put(10)
    assert world.buffer.stats().rows == 5
    assert world.buffer.stats().buffer_id == world.stores[0].buffer_id
    assert world.adds_up()
    world.heal()
    world.backend.advance(RETRY_INITIAL)
    assert world.there() == [0, 1, 9, 10, 11]
    assert world.buffer.stats().lost == {"capacity": 7}
    assert world.adds_up()


def test_warnings_of_flapping_disk_are_rate_limited(world, caplog):
    """Each subject is logged as a warning at most once a minute."""
    for _ in range(4):
        world.ail("other")
        world.put(1)
        world.heal()
        world.backend.advance(RETRY_INITIAL * 4)
        world.put(1)
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    assert sum("in memory only" in text for text in warnings) <= 2
    assert sum("on disk again" in text for text in warnings) <= 2
    assert world.buffer.failures >= 3
    world.backend.advance(RETRY_MAX)
    assert world.there() == list(range(8))


def test_disk_retry_backs_off(world):
    """A failed disk is tried after 5 s, then at growing intervals up to five minutes."""
    world.ail("other")
    world.put(1)
    world.calls = 0
    for _ in range(2000):
        world.backend.advance(1)
        world.there()
    assert 6 <= world.calls <= 6 + 2000 / RETRY_MAX + 1


def test_close_moves_memory_to_disk(world):
    """A clean stop tries once more to move rows from memory to the disk."""
    world.put(1)
    world.ail("other")
    world.put(2)
    world.heal()
    disk = world.stores[0]
    kept, disk.close = [], lambda: kept.append(disk.size())
    world.buffer.close()
    assert kept == [3]


def test_close_logs_rows_lost_in_memory(world, caplog):
    """If the disk still fails, the log says how many rows are lost with the process."""
    world.ail("other")
    world.put(2)
    world.buffer.close()
    assert "2 rows were in memory only" in caplog.text


def test_other_error_is_raised_without_fallback(world):
    """Only a storage error switches to memory; any other error is a bug and is raised."""
    world.put(1)
    world.stores[0].append = None
    with pytest.raises(TypeError):
        world.put(1)
    assert world.buffer.durable


# -- tidying


def test_idle_store_is_vacuumed_until_complete(world):
    """After deletes, empty reads run a vacuum step every second until the vacuum is complete."""
    world.put(3)
    world.stores[0].untidy = 3
    world.buffer.ack([1, 2, 3], 3, 0)
    world.buffer.read_next(*NOTHING)
    assert world.stores[0].done == []
    for _ in range(50):
        world.backend.advance(0.1)
        world.buffer.read_next(*NOTHING)
    assert world.stores[0].done == ["vacuum_step"] * 3


def test_vacuum_waits_while_rows_are_read(world):
    """A read that finds rows or follows an ack runs no vacuum step."""
    world.put(3)
    for _ in range(5):
        world.backend.advance(1)
        assert len(world.there()) == 3
    assert world.stores[0].done == []


def test_failed_vacuum_has_no_effect(world):
    """An error in a vacuum step does not switch to memory."""
    world.put(1)

    def fail():
        raise trouble(FULL)

    world.stores[0].vacuum_step = fail
    world.buffer.ack([1], 1, 0)
    world.buffer.read_next(*NOTHING)
    world.backend.advance(1)
    world.buffer.read_next(*NOTHING)
    assert world.buffer.durable


def test_notice_is_logged_once(world, caplog):
    """The warning about another directory is logged once, although two stores have it."""
    open_store = world.buffer._disk._open_store

    def open_elsewhere():
        store = open_store()
        store.notice = "point Z4J_HOME somewhere"
        return store

    world.buffer._disk._open_store = open_elsewhere
    world.put(1)
    world.ail(CORRUPT, 1)
    world.put(1)
    assert len(world.stores) == 2
    world.put(1)
    assert caplog.text.count("Z4J_HOME") == 1


def test_append_refreshes_stats(world):
    """Without a session, the stats are at most one second and one append old."""
    for _ in range(4):
        world.put(5)
        world.backend.advance(1.1)
    assert world.buffer.last_stats.rows == 15


def test_stats_without_disk_are_those_of_memory(world):
    """If the disk fails from the start, the stats are those of memory."""

    def refuse():
        raise trouble("other")

    world.buffer._disk._open_store = refuse
    assert world.buffer.last_stats is NO_STATS
    world.put(2)
    assert world.buffer.stats().buffer_id != "unopened"
    assert world.adds_up()
