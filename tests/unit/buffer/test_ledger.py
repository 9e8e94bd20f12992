"""The lookup of a command in other processes' stores, running or dead."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import z4j_bare
from z4j_bare.buffer import BufferStore, new_store_path
from z4j_bare.buffer.ledger import find_in_other_stores
from z4j_bare.buffer.rows import IN_OTHER_PROCESS

OWNER = """
import sys
from z4j_bare.buffer import BufferStore, new_store_path
store = BufferStore(new_store_path(sys.argv[1]))
store.claim("begun", 1.0, b"provisional")
store.settle_and_queue("done", b"answer", 2.0)
store.claim("refused", 1.0)
store.settle("refused", b"failure", 2.0, "failed")
if "vacuum" in sys.argv:
    store.vacuum_step()
if "close" in sys.argv:
    store.append([("event", "", b"keeps the file")])
    store.close()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def mine(home):
    store = BufferStore(new_store_path(home))
    yield store
    store.close()


@pytest.fixture
def owner(home):
    """``owner(*words)`` starts another process with a store; it runs until the end of the test."""
    started = []

    def start(*words):
        environment = {**os.environ, "PYTHONPATH": str(Path(z4j_bare.__file__).parent.parent)}
        command = [sys.executable, "-c", OWNER, str(home), *words]
        started.append(
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
        assert started[-1].stdout.readline() == b"ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("words", [(), ("vacuum_step",), ("close",), ("killed",)])
def test_lookup_finds_commands_of_other_processes(home, mine, owner, words):
    """Done entries have a result, started ones are elsewhere, whether the owner runs or not."""
    process = owner(*words)
    if "killed" in words:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert find_in_other_stores(home, mine.path, "done").result == b"answer"
    begun = find_in_other_stores(home, mine.path, "begun")
    assert (begun.state, begun.result) == ("elsewhere", b"")
    assert find_in_other_stores(home, mine.path, "new") is None
    assert find_in_other_stores(home, mine.path, "refused") is None


def test_lookup_skips_own_store(home, mine):
    """An entry of this process's own store is not found."""
    mine.claim("mine", 1.0)
    assert find_in_other_stores(home, mine.path, "mine") is None


def test_lookup_leaves_other_stores_unchanged(home, mine, owner):
    """The file, its log and its lock stay as they were, and the store can be adopted later."""
    process = owner()
    before = sorted(path.name for path in home.parent.iterdir())
    find_in_other_stores(home, mine.path, "begun")
    assert sorted(path.name for path in home.parent.iterdir()) == before
    process.kill()
    process.wait()
    find_in_other_stores(home, mine.path, "begun")
    (path,) = (path for path in home.parent.glob("*.sqlite") if path != mine.path)
    adopter = BufferStore(path, create=False)
    assert adopter.claim("begun", 9.0).result == b"provisional"
    adopter.close()


def test_lookup_ignores_unreadable_files(home, mine):
    """Random bytes, an empty file and a missing directory have no entries and raise nothing."""
    (home.parent / "z4j-green-1-aaaaaaaa.sqlite").write_bytes(b"noise" * 1000)
    (home.parent / "z4j-green-2-aaaaaaaa.sqlite").touch()
    assert find_in_other_stores(home, mine.path, "c") is None
    assert find_in_other_stores(home.parent / "none" / "b.sqlite", mine.path, "c") is None


def test_lookup_finds_key_with_lone_surrogate(home, mine):
    """A key that SQLite cannot encode is looked up in the form in which the ledger stores it."""
    other = BufferStore(new_store_path(home))
    other.claim("fire-\ud800", 1.0, b"")
    found = find_in_other_stores(home, mine.path, "fire-\ud800")
    other.close()
    assert found.state == IN_OTHER_PROCESS
