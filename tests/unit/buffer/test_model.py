"""Both stores compared with a model, after random calls in random order."""

import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from z4j_bare.buffer import EVENT, PROJECTION, RESULT, BufferStore, MemoryStore, batches
from z4j_bare.buffer import recovery as adopt
from z4j_bare.buffer.rows import EVICTION_ORDER
from z4j_bare.buffer.store import ENOUGH_SPACE

pytestmark = pytest.mark.thorough

ALL = (EVENT, RESULT, PROJECTION)
MAX_ROWS = 12
MAX_BYTES = 1024 * 1024
SIZES = st.sampled_from([0, 1, 300, 5000, 60_000, 250_000])
ROWS = st.lists(st.tuples(st.sampled_from(ALL), SIZES), max_size=8)
KINDS = st.just([EVENT]) | st.sets(st.sampled_from(ALL), min_size=1).map(sorted)
ORPHANED = st.lists(st.binary(max_size=300), max_size=6)
PICK = st.lists(st.integers(0, MAX_ROWS - 1), max_size=6)


class StoreMachine(RuleBasedStateMachine):
    """The model: ``(id, kind, payload)`` rows, attempts, three counters and a ledger."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.attempts = Counter()
        self.produced = self.confirmed = self.lost = 0
        self.commands = {}
        self.store = self.open()

    def open(self):
        raise NotImplementedError

    def teardown(self):
        self.store.close()

    def pick_ids(self, picks):
        return sorted({self.rows[pick][0] for pick in picks if pick < len(self.rows)}, reverse=True)

    @rule(rows=ROWS, key=st.sampled_from(["", "key"]), filler=st.sampled_from([b"x", b"\n"]))
    def append(self, rows, key, filler):
        first = self.produced
        batch = [
            (kind, key, b"%08d" % (first + n) + filler * size)
            for n, (kind, size) in enumerate(rows)
        ]
        evicted = self.store.append(batch)
        self.add_to_model(batch, evicted)

    @rule(sizes=st.lists(SIZES, max_size=8))
    def append_events(self, sizes):
        payloads = [b"%08d" % (self.produced + n) + b"x" * size for n, size in enumerate(sizes)]
        evicted = self.store.append_events(payloads)
        self.add_to_model([(EVENT, "", payload) for payload in payloads], evicted)

    def add_to_model(self, batch, evicted):
        first = self.produced
        self.produced += len(batch)
        self.lost += evicted
        new = [(first + n + 1, kind, payload) for n, (kind, _, payload) in enumerate(batch)]
        known = self.rows + new
        assert evicted >= len(known) - MAX_ROWS
        # The evicted rows must be the first in the eviction order, and as many as reported.
        victims = sorted(known, key=lambda row: (EVICTION_ORDER.index(row[1]), row[0]))[:evicted]
        self.rows = [row for row in known if row not in victims]
        if sum(len(row[2]) + 5000 for row in known) < MAX_BYTES * 3 // 4:
            assert evicted == max(0, len(known) - MAX_ROWS)

    @rule(
        after=st.integers(0, 60),
        limit=st.integers(0, 20),
        max_bytes=st.integers(1, 600_000),
        kinds=KINDS,
    )
    def drain(self, after, limit, max_bytes, kinds):
        expected, remaining = [], max_bytes
        for row in self.rows:
            if row[0] <= after or row[1] not in kinds:
                continue
            remaining -= len(row[2])
            if len(expected) == limit or (remaining < 0 and expected):
                break
            expected.append(row)
        read_cached = self.store.read_cached(after, limit, max_bytes, kinds)
        found = self.store.drain(after, limit, max_bytes, kinds)
        assert read_cached in (None, found)
        assert [(entry.id, entry.kind, entry.payload) for entry in found] == expected
        assert [entry.attempts for entry in found] == [self.attempts[row[0]] for row in expected]

    @rule(picks=PICK)
    def increment_attempts(self, picks):
        ids = self.pick_ids(picks)
        self.store.increment_attempts(ids)
        self.attempts.update(ids)

    @rule(picks=PICK, more=st.sampled_from([[], [10**9]]))
    def confirm(self, picks, more):
        ids = self.pick_ids(picks)
        assert self.store.confirm([*ids, *ids[:1], *more]) == len(ids)
        self.confirmed += len(ids)
        self.rows = [row for row in self.rows if row[0] not in ids]

    @rule(picks=PICK, reason=st.sampled_from(["rejected", "poison"]))
    def discard(self, picks, reason):
        ids = self.pick_ids(picks)
        assert self.store.discard(ids, reason) == len(ids)
        self.lost += len(ids)
        self.rows = [row for row in self.rows if row[0] not in ids]

    @rule(key=st.sampled_from("abc"))
    def claim(self, key):
        earlier = self.store.claim(key, 1.0)
        assert (earlier.state if earlier else None) == self.commands.get(key)
        self.commands.setdefault(key, "started")

    @rule(key=st.sampled_from("abc"))
    def settle(self, key):
        self.store.settle(key, b"result", 1.0)
        self.commands[key] = "done"

    @rule()
    def vacuum_step(self):
        self.store.vacuum_step()

    @invariant()
    def is_balanced(self):
        stats = self.store.stats()
        assert (stats.produced, stats.confirmed) == (self.produced, self.confirmed)
        assert sum(stats.lost.values()) == sum(stats.lost_kinds.values()) == self.lost
        assert stats.produced == stats.confirmed + stats.rows + self.lost
        assert stats.rows == self.store.size() == len(self.rows) <= MAX_ROWS
        assert (
            stats.payload_bytes == self.store.byte_size() == sum(len(row[2]) for row in self.rows)
        )
        assert stats.bytes <= MAX_BYTES

    @invariant()
    def rows_equal_model(self):
        found = self.store.drain(0, 1000, 1 << 40, ALL)
        assert [(entry.id, entry.kind, entry.payload) for entry in found] == self.rows


class DiskMachine(StoreMachine):
    """The machine for the store on disk, with close, reopen and kill."""

    def __init__(self):
        # Only processes die in this test, so files in memory suffice and are faster.
        shared = Path("/dev/shm")
        self.folder = Path(
            tempfile.mkdtemp(prefix="z4j-model-", dir=shared if shared.is_dir() else None)
        )
        self.folder.chmod(0o700)
        self.path = self.folder / "store-0.sqlite"
        self.orphan = self.folder / "orphan.sqlite"
        self.copies = 0
        super().__init__()

    def open(self):
        # For this clock, commands at 1.0 are recent, so that a close keeps the file without rows.
        return BufferStore(
            self.path,
            max_rows=MAX_ROWS,
            max_bytes=MAX_BYTES,
            busy_timeout=0,
            deployment="p",
            clock=lambda: 2.0,
        )

    def teardown(self):
        super().teardown()
        shutil.rmtree(self.folder)

    @precondition(lambda self: self.rows or self.commands)
    @rule()
    def reopen(self):
        buffer_id = self.store.buffer_id
        self.store.close()
        self.store = self.open()
        assert self.store.buffer_id == buffer_id

    @precondition(lambda self: not self.rows and not self.commands)
    @rule()
    def close_without_rows(self):
        self.store.close()
        assert list(self.folder.iterdir()) == []
        self.produced = self.confirmed = self.lost = 0
        self.attempts.clear()
        self.store = self.open()

    @rule()
    def crash(self):
        """Continue with the files as a dead process would leave them."""
        old, self.copies = self.path, self.copies + 1
        self.path = self.folder / f"store-{self.copies}.sqlite"
        for suffix in ("", "-wal"):
            source = old.with_name(old.name + suffix)
            if source.exists():
                shutil.copy2(source, self.path.with_name(self.path.name + suffix))
        abandon(self.store)
        for leftover in self.folder.glob(f"{old.name}*"):
            leftover.unlink()
        self.store = self.open()
        assert self.store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    @rule()
    def free_space(self):
        """Free space on a full disk. If the file hardly shrinks, all events are dropped."""
        size = self.store._space.disk_bytes()
        gone = [row for row in self.rows if row[1] == EVENT]
        evicted = self.store.free_space()
        if evicted == 0 and gone:
            assert size - self.store._space.disk_bytes() >= ENOUGH_SPACE
            return
        assert evicted == len(gone)
        self.lost += len(gone)
        self.rows = [row for row in self.rows if row[1] != EVENT]

    @rule(payloads=ORPHANED, lost=st.integers(0, 3), steps=st.integers(0, 4))
    def adopt(self, payloads, lost, steps):
        """Adopt rows of a dead process, all or only some; the rest may follow later."""
        self.leave_orphan(payloads, lost)
        self.step_adoption(steps)
        self.step_adoption()
        self.commands.setdefault("c", "started")
        self.update_from_target(produced=len(payloads))

    @rule(payloads=ORPHANED)
    def die_during_adoption(self, payloads):
        """Die between append and delete: rows may be there twice, but none is missing."""
        self.leave_orphan(payloads, 0)
        orphan = self.claim_orphan()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(orphan._store, "confirm", lambda _ids: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                orphan.step(self.store)
        twice, lost = orphan.moved, self.lost
        abandon(orphan._store)
        self.crash()
        self.step_adoption()
        self.commands.setdefault("c", "started")
        self.update_from_target(produced=len(payloads) + twice)
        if self.lost == lost:
            assert {row[2] for row in self.rows}.issuperset(payloads)

    def leave_orphan(self, payloads, lost):
        dead = BufferStore(self.orphan, deployment="p", busy_timeout=0, clock=lambda: 1.0)
        dead.append([("event", "", payload) for payload in payloads])
        dead.discard(range(1, min(lost, len(payloads)) + 1), "poison")
        dead.claim("c", time.time())
        abandon(dead)

    def claim_orphan(self):
        return adopt.Orphan(self.orphan, "p", max_rows=10**6, max_bytes=1 << 28)

    def step_adoption(self, steps=99):
        """Run some steps of the adoption."""
        if self.orphan.exists():
            orphan = self.claim_orphan()
            while steps and orphan.step(self.store) != adopt.DONE:
                steps -= 1
            orphan.close()

    def update_from_target(self, produced):
        """Update the model after evictions by the target; only the sums matter here."""
        assert not self.orphan.exists()
        stats = self.store.stats()
        assert stats.produced == self.produced + produced
        self.produced, self.lost = stats.produced, sum(stats.lost.values())
        self.rows = [
            (row.id, row.kind, row.payload) for row in self.store.drain(0, 1000, 1 << 40, ALL)
        ]


def abandon(store):
    """Release a store as the system does for a dead process."""
    store._connection.close()
    store._lock.release()


class MemoryMachine(StoreMachine):
    """The machine for the store in memory."""

    def open(self):
        return MemoryStore(max_rows=MAX_ROWS, max_bytes=MAX_BYTES, clock=lambda: 2.0)


_settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True, scope="module")
def _small_steps():
    """Set steps of two rows, so that adoption can stop between steps, and a small cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adopt, "STEP_ROWS", 2)
        patch.setattr(batches, "CACHE_ROWS", 7)
        patch.setattr(batches, "CACHE_BYTES", 300_000)
        yield


TestDisk = DiskMachine.TestCase
TestDisk.settings = _settings
TestMemory = MemoryMachine.TestCase
TestMemory.settings = _settings
