"""Adoption of dead processes' stores: which, by which process, how fast, and without losses."""

import logging
import os
import random
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

import z4j_bare
from tests.support.adopter import Adopter, numbers
from z4j_bare.buffer import BufferStore, new_store_path, recovery
from z4j_bare.buffer.adopt_loop import (
    MAX_RETRIES,
    RETRY_DELAY,
    SCAN_INTERVAL,
    SKIP_SECONDS,
    AdoptLoop,
)
from z4j_bare.buffer.files import lock_path
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.recovery import STEP_ROWS, TARGET_BACKLOG, Orphan, orphans
from z4j_bare.buffer.rows import KINDS
from z4j_bare.errors import LocalStorageError

ROOT = Path(z4j_bare.__file__).parent.parent
ALL = tuple(KINDS)
CAPS = {"max_rows": 100_000, "max_bytes": 1 << 28}

#: Appends rows, of which 30 are evicted and 7 acked, inserts two commands, reports and waits.
OWNER = """
import sys
from z4j_bare.buffer import BufferStore, new_store_path
path, rows = new_store_path(sys.argv[1]), int(sys.argv[2])
store = BufferStore(path, deployment=sys.argv[3], max_rows=rows - 30)
for first in range(0, rows, 500):
    store.append([("event", "t", b"%d" % n) for n in range(first, min(rows, first + 500))])
store.confirm([entry.id for entry in store.drain(0, 7, 1 << 20, ("event",))])
now = __import__("time").time()
store.claim("begun", now)
store.claim("done", now)
store.settle("done", b"answer", now)
if "fork" in sys.argv:
    import os, signal
    child = os.fork()
    if not child:
        signal.pause()
    print(child, end=" ")
print(path, flush=True)
for line in sys.stdin:
    store.append([("event", "t", b"late")])
    print(store.size(), flush=True)
"""

#: Adopts all orphans, a few rows per step, reports each step and waits.
ADOPTER = """
import sys
from z4j_bare.buffer import BufferStore, new_store_path
from z4j_bare.buffer import recovery as adopt
from z4j_bare.errors import LocalStorageError
adopt.STEP_ROWS, adopt.TARGET_BACKLOG = 25, 10**6
home = sys.argv[1]
mine = BufferStore(new_store_path(home), deployment="p")
print("ready", flush=True)
sys.stdin.readline()
for path in adopt.orphans(home, ()):
    try:
        orphan = adopt.Orphan(path, "p", max_rows=10**6, max_bytes=1 << 28)
    except LocalStorageError:
        continue
    while orphan.step(mine) != "done":
        print("step", flush=True)
print("end", flush=True)
sys.stdin.readline()
mine.close()
"""


@pytest.fixture
def home(tmp_path):
    """The configured path; only its directory matters."""
    return tmp_path / "home" / "buffer.sqlite"


@pytest.fixture(autouse=True)
def _own_temporary_directory(tmp_path, monkeypatch):
    """Keep orphans of this machine out of the tests."""
    monkeypatch.setattr(
        "z4j_bare.buffer.files.candidate_directories", lambda path: [Path(path).parent]
    )


@pytest.fixture
def process():
    """Starts Python with one of the scripts above; kills it after the test."""
    started = []

    def start(script, *args):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(args[0].parent)}
        command = [sys.executable, "-c", script, *map(str, args)]
        started.append(
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        )
        return started[-1]

    yield start
    for running in started:
        running.kill()
        running.wait()
        running.stdin.close()
        running.stdout.close()


@pytest.fixture
def adopter(home):
    one = Adopter(home)
    yield one
    one.end()


def orphan(home, rows=10, deployment="p", first=0, clock=None, size=0):
    """Leave a store like a dead process; return its path."""
    options = {"clock": clock} if clock else {}
    store = BufferStore(new_store_path(home), deployment=deployment, **options)
    for start in range(first, first + rows, 5000):
        store.append(
            [
                ("event", "t", b"%d" % number + b" " * size)
                for number in range(start, min(first + rows, start + 5000))
            ]
        )
    store._connection.close()
    store._lock.release()
    return store.path


def killed(process):
    path = process.stdout.readline().decode().split()[-1]
    process.kill()
    process.wait()
    return Path(path)


# -- which stores


def test_store_of_killed_process_is_adopted(process, home, adopter):
    """Rows, losses and commands of a killed owner are moved at once, and its file is deleted."""
    path = killed(process(OWNER, home, 1000, "p"))
    adopter.run(1.0)
    assert numbers(adopter.rows()) == list(range(37, 1000))
    stats = adopter.buffer.stats()
    assert stats.lost == {"capacity": 30}
    assert 7 + stats.rows + sum(stats.lost.values()) == 1000, (
        "produced = acknowledged + buffered + lost"
    )
    assert stats.produced == stats.confirmed + stats.rows + sum(stats.lost.values())
    assert adopter.store.claim("done", 1e12).result == b"answer"
    assert adopter.store.claim("begun", 1e12).state == "started"
    assert adopter.store.claim("new", 1e12) is None
    assert not path.exists()
    assert not lock_path(path).exists()
    assert adopter.woken >= 2


def test_interrupted_commands_send_provisional_results(home, adopter):
    """Interrupted commands send their provisional result, finished ones their result."""
    store = BufferStore(new_store_path(home), deployment="p")
    store.claim("died", 1e12, b"provisional")
    store.claim("silent", 1e12)
    store.settle_and_queue("done", b"answer", 1e12)
    store._connection.close()
    store._lock.release()
    adopter.run(1.0)
    results = {entry.key: entry.payload for entry in adopter.store.drain(0, 9, 99, ("result",))}
    assert results == {"died": b"provisional", "done": b"answer"}
    assert [adopter.store.claim(key, 1e12).state for key in ("died", "silent", "done")] == [
        "done",
        "started",
        "done",
    ]
    assert orphans(home, {adopter.store.path}) == []


def test_forked_child_does_not_keep_lock_of_dead_parent(process, home, adopter):
    """A running child has the parent's descriptors, but not its lock."""
    owner = process(OWNER, home, 100, "p", "fork")
    child = int(owner.stdout.readline().split()[0])
    try:
        owner.kill()
        owner.wait()
        adopter.run(1.0)
        assert len(adopter.rows()) == 63
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_store_of_running_owner_is_not_adopted(process, home, adopter):
    """A store is not touched while its owner runs, and is adopted a minute later at most."""
    owner = process(OWNER, home, 100, "p")
    path = Path(owner.stdout.readline().decode().strip())
    before = path.stat().st_ino
    adopter.run(100.0)
    owner.stdin.write(b"\n")
    assert int(owner.stdout.readline()) == 64
    assert adopter.rows() == []
    assert path.stat().st_ino == before
    owner.kill()
    owner.wait()
    adopter.run(SCAN_INTERVAL)
    assert len(adopter.rows()) == 64


def test_store_of_other_deployment_is_not_adopted(home, adopter):
    """The file of another project stays as it is and is not opened again for a while."""
    path = orphan(home, deployment="another")
    before, claims, claim = path.read_bytes(), [], adopter.loop._claim
    adopter.loop._claim = lambda found: claims.append(found) or claim(found)
    adopter.run(SCAN_INTERVAL * 4)
    assert adopter.rows() == []
    assert path.read_bytes() == before
    assert claims.count(path) == 1
    adopter.run(SKIP_SECONDS)
    assert claims.count(path) == 2


def test_stores_of_asyncio_agent_are_not_adopted(home, adopter):
    """``buffer-*.sqlite`` files are not opened, locked or renamed."""
    home.parent.mkdir(mode=0o700)
    theirs = home.parent / "buffer-123-0123456789ab.sqlite"
    theirs.write_bytes(b"whatever is in there")
    adopter.run(SCAN_INTERVAL * 2)
    assert theirs.read_bytes() == b"whatever is in there"
    assert not lock_path(theirs).exists()


@pytest.mark.parametrize("how", ["link", "open", "directory", "garbage mark"])
def test_unsafe_files_are_not_adopted(home, adopter, how):
    """A link, a writable file, a directory and a foreign database are left unchanged."""
    path = orphan(home)
    if how == "link":
        target = home.parent / "elsewhere"
        path.rename(target)
        path.symlink_to(target)
    elif how == "open":
        path.chmod(0o666)
    elif how == "directory":
        path.unlink()
        path.mkdir()
    else:
        data = bytearray(path.read_bytes())
        data[68:72] = b"none"
        path.write_bytes(data)
    adopter.run(SCAN_INTERVAL)
    assert adopter.rows() == []
    assert os.path.lexists(path)


def test_own_store_is_not_an_orphan(home, adopter):
    """A scan does not touch the lock of this process's own store."""
    adopter.buffer.append([("event", "", b"1")])
    adopter.run(SCAN_INTERVAL * 2)
    assert numbers(adopter.rows()) == [1]
    assert adopter.store.path in orphans(home, ())


def test_shared_directory_is_not_scanned(home):
    """Other users could create files in a directory that they can write."""
    orphan(home)
    home.parent.chmod(0o777)
    assert orphans(home, ()) == []


def test_missing_directory_has_no_orphans(tmp_path):
    """A scan creates nothing."""
    assert orphans(tmp_path / "nowhere" / "buffer", ()) == []
    assert not (tmp_path / "nowhere").exists()


# -- steps


def test_adopted_rows_keep_age_and_attempts(home, adopter):
    """The age and the attempts of a row do not restart."""
    path = orphan(home, 3, clock=lambda: 1000.0)
    store = BufferStore(path, deployment="p")
    store.increment_attempts([2])
    store._connection.close()
    store._lock.release()
    adopter.run()
    found = adopter.store.drain(0, 10, 100, ALL)
    assert [(entry.created_at, entry.attempts) for entry in found] == [
        (1000.0, 0),
        (1000.0, 1),
        (1000.0, 0),
    ]


def test_orphans_are_adopted_oldest_first(home, adopter):
    """All orphans are adopted, the least recently modified first."""
    for index in (2, 0, 1):
        path = orphan(home, 5, first=index * 5)
        os.utime(path, (1000 + index, 1000 + index))
    adopter.run()
    assert numbers(adopter.rows()) == list(range(15))


def test_large_backlog_is_adopted_as_it_is_acked(home, adopter):
    """At most one window and one step of rows are ahead of a new event."""
    path = orphan(home, 6000)
    adopter.run()
    assert TARGET_BACKLOG <= len(adopter.rows()) < TARGET_BACKLOG + STEP_ROWS
    assert adopter.buffer.orphan_rows == 6000 - len(adopter.rows())
    adopter.buffer.append([("event", "", b"-1")])
    assert numbers(adopter.rows()).index(-1) < TARGET_BACKLOG + STEP_ROWS
    seen, turns = 0, 0
    while len(adopter.rows()):
        seen += min(300, len(adopter.rows()))
        adopter.acknowledge(300)
        adopter.backend.advance(0.5)
        turns += 1
        assert len(adopter.rows()) < TARGET_BACKLOG + STEP_ROWS
    assert seen == 6001
    assert turns <= 22, "the brain never waited for rows"
    assert adopter.buffer.orphan_rows == 0
    assert not path.exists()


def test_small_target_store_evicts_nothing(home):
    """Adoption fills a quarter of the target's caps and one step, and evicts nothing."""
    orphan(home, 3000)
    adopter = Adopter(home, max_rows=1000)
    adopter.run()
    assert 250 <= len(adopter.rows()) < 250 + STEP_ROWS
    assert adopter.buffer.stats().lost == {}
    adopter.end()


def test_stop_during_adoption_releases_orphan(home):
    """A clean stop leaves the rest to the next process, which finds each row once."""
    orphan(home, 4000)
    first = Adopter(home)
    first.run()
    first.end()
    second = Adopter(home)
    second.run()
    rows = second.acknowledge_all()
    assert sorted(rows) == list(range(4000))
    second.end()
    assert list(home.parent.iterdir()) == []


def test_orphans_are_not_adopted_into_memory(home, adopter):
    """While the disk is failed, rows stay in their own file."""
    path = orphan(home, 10)
    open_store, adopter.buffer._disk._open_store = adopter.buffer._disk._open_store, None

    def refuse():
        raise LocalStorageError("no disk")

    adopter.buffer._disk._open_store = refuse
    adopter.buffer.append([("event", "", b"1")])
    adopter.run(3.0)
    assert path.exists()
    adopter.buffer._disk._open_store = open_store
    adopter.backend.advance(10)
    adopter.buffer.append([("event", "", b"1")])
    adopter.run(SCAN_INTERVAL)
    assert len(adopter.rows()) == 12
    assert not path.exists()


def test_corrupt_orphan_is_quarantined(home, adopter, caplog):
    """It is renamed and logged once, and only the newest such file is kept."""
    for index in range(2):
        path = orphan(home, 200, first=index)
        path.write_bytes(b"no database at all" + bytes(9000))
        adopter.run(SCAN_INTERVAL)
    aside = [found.name for found in home.parent.iterdir() if ".corrupt-" in found.name]
    assert len(aside) == 1
    assert aside[0].startswith(path.name)
    assert not path.exists()
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 2


def test_failing_target_leaves_orphan_unchanged(home, adopter):
    """When the target's append fails, the orphan keeps its rows and is tried again later."""
    path = orphan(home, 10)
    adopter.buffer.append([("event", "", b"100")])
    import_rows = adopter.store.import_rows

    def refuse(rows):
        raise LocalStorageError("the disk is full")

    adopter.store.import_rows = refuse
    adopter.run(3)
    assert adopter.buffer.durable
    assert path.exists()
    adopter.store.import_rows = import_rows
    adopter.run(SKIP_SECONDS + SCAN_INTERVAL)
    assert sorted(numbers(adopter.rows())) == [*range(10), 100]


def test_failed_step_moves_no_row_twice(home, adopter):
    """When the orphan cannot delete moved rows, no row is moved again once it can."""
    orphan(home, 700)
    refusals, confirm = [3], BufferStore.confirm

    def refuse(store, ids):
        if store is not adopter.store and refusals[0]:
            refusals[0] -= 1
            raise LocalStorageError("the disk is full")
        return confirm(store, ids)

    BufferStore.confirm = refuse
    try:
        adopter.run(200)
    finally:
        BufferStore.confirm = confirm
    assert refusals == [0]
    assert numbers(adopter.rows()) == list(range(700))


def test_failures_between_moved_rows_do_not_end_adoption(home, adopter, monkeypatch):
    """Only failures without a moved row between them count, so a slow disk delays the adoption."""
    monkeypatch.setattr(recovery, "STEP_ROWS", 10)
    steps = 2 * MAX_RETRIES
    orphan(home, steps * 10)

    def claim(path):
        claimed = adopter.claim(path)
        step, calls = claimed.step, count()

        def fail_every_other_step(target):
            if next(calls) % 2 == 0:
                raise LocalStorageError("the disk is slow")
            return step(target)

        claimed.step = fail_every_other_step
        return claimed

    adopter.loop._claim = claim
    adopter.run((steps + 1) * RETRY_DELAY)
    assert numbers(adopter.rows()) == list(range(steps * 10))


def damage(path, first):
    """Overwrite pages from the fraction ``first`` of the file on, except the last: the counters."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        for page in range(int(size * first) // 4096 * 4096, size - 8 * 4096, 4096):
            file.seek(page)
            file.write(os.urandom(4096))


def test_rows_of_damaged_orphan_count_as_lost(home, adopter):
    """A damaged orphan is quarantined; its counters, if readable, say how many rows are lost."""
    path = orphan(home, 5000, size=1000)
    damage(path, 0.5)
    adopter.run(1)
    assert adopter.buffer.stats().lost == {"corrupt": 5000}
    assert not path.exists()


def test_damage_found_during_adoption_is_counted(home, adopter, caplog):
    """Every row of the orphan is in the target or counted as lost."""
    path = orphan(home, 5000, size=1000)
    adopter.run(1)
    damage(path, 0.5)
    for _ in range(20):
        adopter.acknowledge(5000)
        adopter.backend.advance(1)
    stats = adopter.buffer.stats()
    assert 1000 <= stats.confirmed < 5000
    assert stats.confirmed + stats.lost["corrupt"] == 5000
    assert not path.exists()
    assert any(f"{path.name}.corrupt-" in found.name for found in home.parent.iterdir())
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1


# -- several processes


def test_two_processes_never_adopt_same_file(process, home):
    """When two processes scan at once, each file goes to one, and each row arrives once."""
    for index in range(12):
        orphan(home, 200, first=index * 200)
    heirs = [process(ADOPTER, home) for _ in range(2)]
    for each in heirs:
        assert each.stdout.readline() == b"ready\n"
    for each in heirs:
        each.stdin.write(b"go\n")
    for each in heirs:
        while each.stdout.readline() != b"end\n":
            assert each.poll() is None
    for each in heirs:
        each.kill()
        each.wait()
    left = [BufferStore(path, deployment="p", create=False) for path in orphans(home, ())]
    assert len(left) == 2
    rows = [int(entry.payload) for store in left for entry in store.drain(0, 10**6, 1 << 40, ALL)]
    assert sorted(rows) == list(range(2400))
    for store in left:
        store.close()


@pytest.mark.thorough
@pytest.mark.parametrize("trial", range(6))
def test_kill_during_adoption_loses_no_row(process, home, trial):
    """After a kill at a random step, the next process finds every row, at most one step twice."""
    orphan(home, 1500)
    first = process(ADOPTER, home)
    assert first.stdout.readline() == b"ready\n"
    first.stdin.write(b"go\n")
    for _ in range(random.Random(trial).randrange(1, 50)):
        assert first.stdout.readline() == b"step\n"
    first.kill()
    first.wait()
    second = Adopter(home)
    second.run()
    rows = second.acknowledge_all()
    assert set(rows) == set(range(1500))
    assert len(rows) <= 1525
    second.end()
    assert list(home.parent.iterdir()) == []


def test_adopt_loop_runs_in_this_mode(home, backend, until):
    """With this mode's backend, an orphan is adopted, and the loop ends with its event."""
    orphan(home, 700)
    buffer = BufferManager(lambda: BufferStore(new_store_path(home), deployment="p"), backend)
    stop_event = backend.event()
    loop = AdoptLoop(str(home), lambda path: Orphan(path, "p", **CAPS), buffer, backend, int)
    task = backend.spawn(loop.run, stop_event, name="z4j-adopt")
    until(lambda: buffer.stats().rows == 700)
    stop_event.set()
    assert task.join(10)
    buffer.close()
