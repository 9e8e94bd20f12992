"""The manager in virtual time: retries, recovery from errors, memory and its accounting."""

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
NO_ROWS = ((0, 0, ()), (0, 1, ("event",)), 1)


def storage_error(cause):
    """Return an error as a store raises it."""
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


class FailingStore(MemoryStore):
    """A store that fails on demand and records the recovery calls."""

    def __init__(self, harness):
        super().__init__()
        self.harness = harness
        self.done = []
        self.vacuum_steps_left = 0

    def append(self, rows):
        self.harness.raise_if_failing()
        return super().append(rows)

    def import_rows(self, rows):
        self.harness.raise_if_failing()
        return super().import_rows(rows)

    def free_space(self):
        self.done.append("free_space")
        self.harness.freed += 1
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
        self.vacuum_steps_left = max(0, self.vacuum_steps_left - 1)
        return not self.vacuum_steps_left


class ManagerHarness:
    """A manager whose stores fail with ``cause`` for the next ``failures_left`` calls."""

    def __init__(self):
        self.backend = FakeConcurrency()
        self.stores = []
        self.cause, self.failures_left, self.freed, self.calls = "", 0, 0, 0
        self.buffer = BufferManager(self.open, self.backend)
        self.sent = 0

    def open(self):
        self.stores.append(FailingStore(self))
        return self.stores[-1]

    def raise_if_failing(self):
        self.calls += 1
        if self.failures_left > 0:
            self.failures_left -= 1
            raise storage_error(self.cause)

    def fail_with(self, cause, failures_left=10**9):
        self.cause, self.failures_left = cause, failures_left

    def repair(self):
        self.failures_left = 0

    def append_numbers(self, number):
        self.buffer.append([("event", "", b"%d" % (self.sent + n)) for n in range(number)])
        self.sent += number

    def read_numbers(self):
        """Return the events that a sender would read now."""
        return [
            int(row.payload)
            for row in self.buffer.read_next((0, 0, ()), (0, 10**6, ("event",)), 1 << 30)[1]
        ]

    def is_balanced(self):
        stats = self.buffer.stats()
        assert sum(stats.lost.values()) == sum(stats.lost_kinds.values())
        return self.sent == stats.rows + sum(stats.lost.values()) + stats.confirmed


@pytest.fixture
def harness():
    return ManagerHarness()


@pytest.mark.parametrize("cause", sorted(CODES))
def test_error_has_expected_cause(cause):
    """The errors of this module have the causes that the manager recovers from."""
    assert classify(storage_error(cause)) == cause


def test_cached_rows_need_no_disk_call(harness, monkeypatch):
    """Recent rows are read on the hub; the disk is called for due stats or pending deletes."""
    harness.append_numbers(3)
    disk_calls, offload = [], harness.backend.offload
    monkeypatch.setattr(
        harness.backend, "offload", lambda *call: disk_calls.append(call) or offload(*call)
    )
    assert (harness.read_numbers(), disk_calls) == ([0, 1, 2], [])
    harness.backend.advance(1.5 * module.STATS_INTERVAL)
    assert (harness.read_numbers(), len(disk_calls)) == ([0, 1, 2], 0), (
        "not for the figures' sake alone"
    )
    harness.backend.advance(module.STATS_INTERVAL_IDLE)
    assert (harness.read_numbers(), len(disk_calls)) == ([0, 1, 2], 1)
    harness.buffer.ack((1, 2, 3), 3, 0)
    assert (harness.read_numbers(), len(disk_calls)) == ([], 2)


def test_acked_rows_are_deleted_by_next_call(harness, monkeypatch):
    """A read of cached rows or results defers the delete; an append or an empty read does not."""
    harness.append_numbers(4)
    disk_calls, offload = [], harness.backend.offload
    monkeypatch.setattr(
        harness.backend, "offload", lambda *call: disk_calls.append(call) or offload(*call)
    )
    harness.buffer.ack((1,), 1, 0)
    found = harness.buffer.read_next((0, 0, ()), (1, 10, ("event",)), 1 << 30)[1]
    assert ([row.id for row in found], harness.buffer.acked_events, disk_calls) == (
        [2, 3, 4],
        0,
        [],
    )
    assert not harness.buffer.is_idle
    harness.append_numbers(1)
    assert (harness.buffer.acked_events, len(disk_calls)) == (1, 1)
    harness.buffer.ack((2,), 1, 0)
    assert harness.buffer.read_next((0, 10, ("result",)), (2, 0, ("event",)), 1 << 30) == ([], [])
    assert (harness.buffer.acked_events, len(disk_calls)) == (1, 1), (
        "who may send no events will be back soon"
    )
    harness.backend.advance(MAX_DEFER_SECONDS)
    assert harness.buffer.read_next((0, 0, ()), (2, 10, ("event",)), 1 << 30)[1]
    assert (harness.buffer.acked_events, len(disk_calls)) == (2, 2)
    harness.buffer.ack((3, 4, 5), 3, 0)
    assert harness.buffer.read_next((0, 0, ()), (5, 10, ("event",)), 1 << 30) == ([], [])
    assert (harness.buffer.acked_events, harness.buffer.last_stats.lost) == (5, {})


def test_manager_is_idle_after_vacuum(harness):
    """After a delete, the manager is idle once an empty read has completed the vacuum."""
    harness.append_numbers(1)
    harness.buffer.ack((1,), 1, 0)
    nothing = ((0, 0, ()), (1, 10, ("event",)), 1 << 30)
    assert harness.buffer.read_next(*nothing) == ([], [])
    assert (harness.buffer.acked_events, harness.buffer.is_idle) == (1, False)
    harness.backend.advance(VACUUM_INTERVAL)
    assert harness.buffer.read_next(*nothing) == ([], [])
    assert harness.buffer.is_idle


def test_acked_rows_are_not_read_again(harness):
    """A sender that restarts does not get acked rows, although they are still cached."""
    harness.append_numbers(3)
    harness.buffer.ack((1, 2), 2, 0)
    assert harness.read_numbers() == [2]


@pytest.mark.parametrize(
    "add",
    [
        BufferManager.append,
        lambda buffer, rows: buffer.append_events([payload for _, _, payload in rows]),
    ],
)
def test_full_store_deletes_acked_rows_before_eviction(harness, add):
    """Acked rows are deleted before the caps apply; an eviction would count them as lost."""
    harness.buffer._disk._open_store = lambda: MemoryStore(max_rows=10)
    rows = [("event", "", b"%d" % number) for number in range(10)]
    add(harness.buffer, rows)
    harness.buffer.ack(range(1, 8), 7, 0)
    add(harness.buffer, rows[:7])
    stats = harness.buffer.stats()
    assert (stats.rows, stats.confirmed, stats.lost, harness.buffer.acked_events) == (10, 7, {}, 7)


def test_acked_row_is_counted_once_on_busy_disk(harness):
    """While the disk is busy, the delete is repeated with its call, and each row counts once."""
    harness.append_numbers(3)
    harness.buffer.ack((1, 2), 2, 0)
    harness.fail_with(BUSY, 2)
    harness.append_numbers(1)
    assert (harness.buffer.acked_events, harness.buffer.stats().confirmed) == (2, 2)
    assert harness.is_balanced()


def test_acks_of_memory_do_not_delete_disk_rows(harness):
    """Ids of rows in memory belong to other rows on the disk."""
    harness.append_numbers(3)
    harness.fail_with("other")
    harness.append_numbers(2)
    harness.repair()
    harness.buffer.ack((1, 2), 2, harness.buffer.generation)
    harness.backend.advance(RETRY_INITIAL)
    assert harness.read_numbers() == [0, 1, 2, 3, 4]
    assert harness.buffer.durable
    assert harness.is_balanced()


def test_close_deletes_acked_rows(harness):
    """The next process does not send them again."""
    harness.append_numbers(3)
    deleted = []
    harness.stores[0].confirm = lambda ids: deleted.extend(ids)
    harness.buffer.ack((1, 3), 2, 0)
    harness.buffer.close()
    assert (deleted, harness.buffer.acked_events) == ([1, 3], 2)


# -- busy


def test_busy_disk_is_retried(harness):
    """A disk that is locked for a second delays the call by that second and has no other effect."""
    harness.fail_with(BUSY, 4)
    harness.append_numbers(3)
    assert 0 < harness.backend.now() < 1.5
    assert (harness.buffer.durable, harness.buffer.failures, harness.buffer.generation) == (
        True,
        0,
        0,
    )
    assert harness.read_numbers() == [0, 1, 2]


def test_busy_disk_times_out(harness):
    """A disk that stays locked is replaced after some seconds, in which other tasks run."""
    ticks = []
    harness.backend.spawn(
        lambda: [
            ticks.append(harness.backend.now()) or harness.backend.sleep(0.1) for _ in range(20)
        ],
        name="host",
    )
    harness.fail_with(BUSY)
    harness.append_numbers(1)
    assert BUSY_TIMEOUT <= harness.backend.now() <= BUSY_TIMEOUT + 1
    assert len(ticks) == 20
    assert not harness.buffer.durable
    assert harness.is_balanced()


# -- full, corrupt, deleted


def test_full_disk_evicts_oldest_events(harness, caplog):
    """Space is freed once and the call repeated; the loss is counted and logged once a minute."""
    harness.append_numbers(4)
    for _ in range(3):
        harness.fail_with(FULL, 1)
        harness.append_numbers(2)
    assert harness.buffer.durable
    assert harness.stores[0].done.count("free_space") == 3
    assert harness.read_numbers() == [6, 7, 8, 9]
    assert harness.buffer.stats().lost == {"capacity": 6}
    assert harness.is_balanced()
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ] == [
        (
            "z4j: the disk is full: the 2 oldest events in Z4J_HOME were dropped and count as lost "
            "(cannot append to the store: full). Free disk space, or lower Z4J_BUFFER_MAX_BYTES, "
            "which each process of this Z4J_HOME may use"
        )
    ]


def test_full_disk_that_shrinking_relieves_drops_no_event(harness, caplog, monkeypatch):
    """After the file has shrunk, the call is repeated. The warning says that nothing is lost."""
    harness.append_numbers(4)
    monkeypatch.setattr(harness.stores[0], "free_space", lambda: 0)
    harness.fail_with(FULL, 1)
    harness.append_numbers(2)
    assert harness.buffer.durable
    assert harness.buffer.stats().lost == {}
    assert harness.is_balanced()
    (warning,) = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    assert "no event was dropped (cannot append to the store: full). Free disk space" in warning


def test_disk_that_stays_full_switches_to_memory(harness):
    """When freeing space does not help, rows go to memory, and no more are evicted."""
    harness.append_numbers(4)
    harness.fail_with(FULL)
    harness.append_numbers(2)
    assert harness.stores[0].done == ["free_space"]
    assert not harness.buffer.durable
    assert harness.is_balanced()
    assert harness.buffer.last_stats.rows == 4


def test_corrupt_file_is_quarantined_and_replaced(harness, caplog):
    """The rows of the old file count as lost, and ids of the old generation are ignored."""
    harness.append_numbers(5)
    generation = harness.buffer.generation
    harness.fail_with(CORRUPT, 1)
    harness.append_numbers(2)
    assert harness.stores[0].done == ["set aside"]
    assert len(harness.stores) == 2
    assert harness.buffer.durable
    assert harness.buffer.generation == generation + 1
    harness.buffer.ack([1, 2], 2, generation)
    harness.buffer.read_next(*NO_ROWS)
    harness.buffer.discard([1, 2], "poison", generation)
    assert harness.read_numbers() == [5, 6]
    assert harness.buffer.stats().lost == {"corrupt": 5}
    assert harness.is_balanced()
    assert caplog.text.count("is corrupt") == 1


def test_losses_of_corrupt_file_are_reported_from_memory(harness):
    """After a corrupt file and a failed disk, memory and then the next file report the losses."""
    harness.append_numbers(5)
    opened = harness.buffer._disk._open_store

    def refuse():
        raise storage_error("other")

    harness.buffer._disk._open_store = refuse
    harness.fail_with(CORRUPT, 1)
    harness.append_numbers(2)
    assert not harness.buffer.durable
    assert harness.buffer.stats().lost == {"corrupt": 5}
    assert harness.is_balanced()
    harness.buffer._disk._open_store = opened
    harness.backend.advance(RETRY_INITIAL)
    assert harness.read_numbers() == [5, 6]
    assert harness.buffer.stats().lost == {"corrupt": 5}
    assert harness.is_balanced()


def test_rows_of_deleted_file_are_copied(harness):
    """The rows of a deleted file would vanish with the process, so a new file gets them."""
    harness.append_numbers(5)
    harness.fail_with(DELETED, 1)
    harness.append_numbers(2)
    assert harness.stores[0].closed
    assert harness.read_numbers() == [0, 1, 2, 3, 4, 5, 6]
    assert harness.buffer.durable
    assert harness.is_balanced()


# -- memory


def test_losses_in_memory_are_recorded_on_disk(harness):
    """Rows that memory evicted are still reported as lost after the return to the disk."""
    harness.buffer._new_memory = lambda: MemoryStore(max_rows=3)
    harness.append_numbers(2)
    harness.fail_with("other")
    harness.append_numbers(10)
    assert harness.buffer.stats().rows == 5
    assert harness.buffer.stats().buffer_id == harness.stores[0].buffer_id
    assert harness.is_balanced()
    harness.repair()
    harness.backend.advance(RETRY_INITIAL)
    assert harness.read_numbers() == [0, 1, 9, 10, 11]
    assert harness.buffer.stats().lost == {"capacity": 7}
    assert harness.is_balanced()


def test_warnings_of_flapping_disk_are_rate_limited(harness, caplog):
    """Each subject is logged as a warning at most once a minute."""
    for _ in range(4):
        harness.fail_with("other")
        harness.append_numbers(1)
        harness.repair()
        harness.backend.advance(RETRY_INITIAL * 4)
        harness.append_numbers(1)
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    assert sum("in memory only" in text for text in warnings) <= 2
    assert sum("on disk again" in text for text in warnings) <= 2
    assert harness.buffer.failures >= 3
    harness.backend.advance(RETRY_MAX)
    assert harness.read_numbers() == list(range(8))


def test_disk_retry_backs_off(harness):
    """A failed disk is tried after 5 s, then at growing intervals up to five minutes."""
    harness.fail_with("other")
    harness.append_numbers(1)
    harness.calls = 0
    for _ in range(2000):
        harness.backend.advance(1)
        harness.read_numbers()
    assert 6 <= harness.calls <= 6 + 2000 / RETRY_MAX + 1


def test_close_moves_memory_to_disk(harness):
    """A clean stop tries once more to move rows from memory to the disk."""
    harness.append_numbers(1)
    harness.fail_with("other")
    harness.append_numbers(2)
    harness.repair()
    disk = harness.stores[0]
    kept, disk.close = [], lambda: kept.append(disk.size())
    harness.buffer.close()
    assert kept == [3]


def test_close_logs_rows_lost_in_memory(harness, caplog):
    """If the disk still fails, the log says how many rows are lost with the process."""
    harness.fail_with("other")
    harness.append_numbers(2)
    harness.buffer.close()
    assert "2 rows were in memory only" in caplog.text


def test_other_error_is_raised_without_fallback(harness):
    """Only a storage error switches to memory; any other error is a bug and is raised."""
    harness.append_numbers(1)
    harness.stores[0].append = None
    with pytest.raises(TypeError):
        harness.append_numbers(1)
    assert harness.buffer.durable


# -- vacuum


def test_idle_store_is_vacuumed_until_complete(harness):
    """After deletes, empty reads run a vacuum step every second until the vacuum is complete."""
    harness.append_numbers(3)
    harness.stores[0].vacuum_steps_left = 3
    harness.buffer.ack([1, 2, 3], 3, 0)
    harness.buffer.read_next(*NO_ROWS)
    assert harness.stores[0].done == []
    for _ in range(50):
        harness.backend.advance(0.1)
        harness.buffer.read_next(*NO_ROWS)
    assert harness.stores[0].done == ["vacuum_step"] * 3


def test_vacuum_waits_while_rows_are_read(harness):
    """A read that finds rows or follows an ack runs no vacuum step."""
    harness.append_numbers(3)
    for _ in range(5):
        harness.backend.advance(1)
        assert len(harness.read_numbers()) == 3
    assert harness.stores[0].done == []


def test_failed_vacuum_has_no_effect(harness):
    """An error in a vacuum step does not switch to memory."""
    harness.append_numbers(1)

    def fail():
        raise storage_error(FULL)

    harness.stores[0].vacuum_step = fail
    harness.buffer.ack([1], 1, 0)
    harness.buffer.read_next(*NO_ROWS)
    harness.backend.advance(1)
    harness.buffer.read_next(*NO_ROWS)
    assert harness.buffer.durable


def test_notice_is_logged_once(harness, caplog):
    """The warning about another directory is logged once, although two stores have it."""
    open_store = harness.buffer._disk._open_store

    def open_elsewhere():
        store = open_store()
        store.notice = "point Z4J_HOME somewhere"
        return store

    harness.buffer._disk._open_store = open_elsewhere
    harness.append_numbers(1)
    harness.fail_with(CORRUPT, 1)
    harness.append_numbers(1)
    assert len(harness.stores) == 2
    harness.append_numbers(1)
    assert caplog.text.count("Z4J_HOME") == 1


def test_append_refreshes_stats(harness):
    """Without a session, the stats are at most one second and one append old."""
    for _ in range(4):
        harness.append_numbers(5)
        harness.backend.advance(1.1)
    assert harness.buffer.last_stats.rows == 15


def test_stats_without_disk_are_those_of_memory(harness):
    """If the disk fails from the start, the stats are those of memory."""

    def refuse():
        raise storage_error("other")

    harness.buffer._disk._open_store = refuse
    assert harness.buffer.last_stats is NO_STATS
    harness.append_numbers(2)
    assert harness.buffer.stats().buffer_id != "unopened"
    assert harness.is_balanced()
