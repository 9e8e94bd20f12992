"""The state of a store after its process is killed, with real processes and SIGKILL."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import z4j_bare
from tests.support import store_scenario
from z4j_bare.buffer import BufferStore
from z4j_bare.buffer.rows import KINDS
from z4j_bare.errors import LocalStorageError

pytestmark = pytest.mark.thorough

ROOT = Path(z4j_bare.__file__).parent.parent

WRITER = """
import sys
from z4j_bare.buffer import BufferStore
store = BufferStore(sys.argv[1], max_bytes=int(sys.argv[2]))
for batch in range(200):
    store.append([("event", "task", b"%d" % (batch * 16 + n) + bytes(300)) for n in range(16)])
    print(batch, flush=True)
sys.stdin.read()
"""

WORKER = """
import sys
from z4j_bare.buffer import BufferStore
store = BufferStore(sys.argv[1], max_rows=100, max_bytes=1 << 20)
after = 0
for batch in range(200):
    store.append([(("event", "event", "result")[n % 3], "task", bytes(700)) for n in range(30)])
    ids = [entry.id for entry in store.drain(after, 20, 1 << 20, ("event", "result"))]
    store.confirm(ids[:12])
    store.discard(ids[12:15], "rejected")
    store.claim(f"c{batch}", 1.0)
    store.settle(f"c{batch}", b"%d" % batch, 1.0)
    store.vacuum_step()
    print(batch, flush=True)
sys.stdin.read()
"""

FORKER = """
import os, signal, sys
from z4j_bare.buffer import BufferStore
store = BufferStore(sys.argv[1])
store.append([("event", "task", b"of the parent")])
child = os.fork()
if child:
    print(child, flush=True)
signal.pause()
"""

CHILD = """
import gc, os, sys
from z4j_bare.buffer import BufferStore
from z4j_bare.errors import LocalStorageError

def refused(call):
    try:
        call()
    except LocalStorageError as error:
        return "this forked process" in str(error) or "in its parent at the fork" in str(error)

path = sys.argv[1]
store = BufferStore(path)
store.append([("event", "", b"1")])
child = os.fork()
if not child:
    good = refused(lambda: store.append([("event", "", b"2")])) and refused(store.stats)
    good = good and refused(lambda: BufferStore(path, create=False)) and store.closed
    store.close()
    # The connection is still open: a close could delete the parent's log.
    good = good and store._connection.total_changes > 0
    del store
    gc.collect()
    os._exit(0 if good else 1)
status = os.waitpid(child, 0)[1]
store.append([("event", "", b"3")])
kept = [entry.payload for entry in store.drain(0, 10, 100, ("event",))]
fine = store._connection.execute("PRAGMA integrity_check").fetchone()
print(status, kept, fine, store.closed, flush=True)
sys.stdin.read()
"""


#: Kills per call of the scenario, 200 in all.
TRIALS = 25


@pytest.fixture
def process():
    """Starts Python with one of the scripts above; kills it after the test."""
    started = []

    def start(script, *args):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *map(str, args)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        )
        return started[-1]

    yield start
    for running in started:
        running.kill()
        running.wait()
        running.stdin.close()
        running.stdout.close()


def kill_at(process, handshake):
    """Kill the process at its n-th report; return the number of committed batches."""
    said = [process.stdout.readline() for _ in range(handshake)]
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines(keepends=True)
    assert process.wait() == -signal.SIGKILL
    return sum(line.endswith(b"\n") for line in said + rest)


def intact(store):
    return store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("trial", range(20))
def test_committed_rows_survive_sigkill(process, tmp_path, trial):
    """After a kill at a random moment, all committed rows are there, in order and once."""
    path = tmp_path / "home" / "store.sqlite"
    # Every other store is small, so that many kills hit a checkpoint of its log.
    child = process(WRITER, path, 256 * 2**20 if trial % 2 else 8 * 2**20)
    committed = kill_at(child, random.Random(trial).randrange(1, 100))
    store = BufferStore(path, create=False)
    found = [
        int(entry.payload.rstrip(b"\0")) for entry in store.drain(0, 10**6, 1 << 40, tuple(KINDS))
    ]
    assert found == list(range(len(found)))
    assert len(found) % 16 == 0  # each batch is complete or absent
    assert committed * 16 <= len(found) <= (committed + 1) * 16
    assert store.stats().produced == store.size() == len(found)
    assert intact(store)
    store.close()


@pytest.mark.parametrize("trial", range(6))
def test_counters_match_rows_after_sigkill(process, tmp_path, trial):
    """After a kill during evictions, the counters add up and no finished command is lost."""
    path = tmp_path / "home" / "store.sqlite"
    committed = kill_at(process(WORKER, path), random.Random(trial).randrange(10, 60))
    store = BufferStore(path, create=False)
    stats = store.stats()
    assert stats.produced >= committed * 30
    assert stats.produced == stats.confirmed + stats.rows + sum(stats.lost.values())
    assert sum(stats.lost.values()) == sum(stats.lost_kinds.values())
    assert set(stats.lost) == {"capacity", "rejected"}
    assert stats.rows == len(store.drain(0, 10**6, 1 << 40, tuple(KINDS))) <= 100
    assert all(store.claim(f"c{batch}", 2.0).result == b"%d" % batch for batch in range(committed))
    assert intact(store)
    store.close()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The calls without a kill: name, number of statements and state after each."""
    store = store_scenario.open_store(
        tmp_path_factory.mktemp("uninterrupted") / "home" / "store.sqlite"
    )
    found, before = [], store_scenario.state(store)
    for name, call in store_scenario.calls(store):
        watch = store_scenario.StatementCounter(store)
        call()
        store._connection.set_trace_callback(None)
        after = store_scenario.state(store)
        found.append((name, watch.statements, before, after))
        before = after
    store.close()
    return found


@pytest.fixture(scope="module")
def server():
    """Forks a process per request; see ``tests.support.store_scenario``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.store_scenario"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as running:
        yield running


def spread(items, number):
    """Choose ``number`` of ``items`` evenly, some of them more than once if there are fewer."""
    return [items[index * len(items) // number] for index in range(number)]


@pytest.mark.parametrize(
    "operation",
    [
        "append",
        "send",
        "ack",
        "delete",
        "discard",
        "increment_attempts",
        "claim",
        "settle",
        "vacuum_step",
    ],
)
def test_call_is_atomic_at_every_statement(server, uninterrupted, tmp_path, operation):
    """Killed before any statement of any call, a store has its state before or after the call."""
    points = [
        (call, statement)
        for call, (name, statements, _, _) in enumerate(uninterrupted)
        for statement in range(statements + 1)
        if name == operation
    ]
    for trial, (call, statement) in enumerate(spread(points, TRIALS)):
        path = tmp_path / f"home-{trial}" / "store.sqlite"
        server.stdin.write(f"{path} {call} {statement}\n".encode())
        pid, commits = map(int, server.stdout.readline().split())
        os.kill(pid, signal.SIGKILL)
        assert int(server.stdout.readline()) == -signal.SIGKILL
        store = store_scenario.open_store(path, create=False)
        _, _, before, after = uninterrupted[call]
        assert store_scenario.state(store) == (after if commits else before), (call, statement)
        assert intact(store)
        store.close()


def test_lock_ends_with_owner_despite_forked_child(process, tmp_path):
    """A second opener is refused while the owner runs, and succeeds right after its SIGKILL."""
    path = tmp_path / "home" / "store.sqlite"
    owner = process(FORKER, path)
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(LocalStorageError, match="running process"):
            BufferStore(path, create=False)
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # the child runs with all inherited descriptors
        store = BufferStore(path, create=False)
        assert [entry.payload for entry in store.drain(0, 10, 100, ("event",))] == [
            b"of the parent"
        ]
        assert store.append([("event", "task", b"new owner")]) == 0
        assert intact(store)
        store.close()
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_forked_child_cannot_use_parents_store(process, tmp_path):
    """Every call in the child is refused, its close has no effect, and the parent continues."""
    child = process(CHILD, tmp_path / "home" / "store.sqlite")
    assert child.stdout.readline().decode().strip() == "0 [b'1', b'3'] ('ok',) False"


def test_refused_opener_leaves_owners_lock(process, tmp_path):
    """A refused attempt of another process closes the lock file but leaves the lock in place."""
    path = tmp_path / "home" / "store.sqlite"
    owner = process(FORKER, path)
    child = int(owner.stdout.readline())
    try:
        for _ in range(2):
            with pytest.raises(LocalStorageError, match="running process"):
                BufferStore(path, create=False)
        assert path.exists()
        assert path.with_name("store.sqlite.lock").exists()
    finally:
        os.kill(child, signal.SIGKILL)
