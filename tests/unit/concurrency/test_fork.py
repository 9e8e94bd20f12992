"""Forks of a process in which the agent runs."""

import json
import os
import signal
import sys
import time
from importlib import import_module

import pytest

from z4j_bare.concurrency import fork
from z4j_bare.errors import ForkedChildError


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_waits_for_offloaded_call(backend, until):
    """A fork waits for an offloaded call: in the child SQLite's mutexes would stay locked."""
    steps = []

    def native():
        steps.append("in")
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            pass
        steps.append("out")

    def fork_during_call():
        steps.clear()
        task = backend.spawn(backend.offload, native, name="busy")
        until(lambda: steps)
        pid = os.fork()
        if not pid:
            os._exit(steps != ["in", "out"])
        assert task.join(10)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert [fork_during_call() for _ in range(3)] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_waits_for_import_on_native_thread(backend, mode, until, tmp_path, monkeypatch):
    """A child can import a module that a task of the agent imported during the fork."""
    if mode != "threads":
        pytest.skip("greenlets survive the fork, so the child finishes the import")
    (tmp_path / "slow_here.py").write_text("import time\ntime.sleep(0.3)\nDONE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = backend.spawn(import_module, "slow_here", name="importer")
    until(lambda: "slow_here" in sys.modules)
    pid = os.fork()
    if not pid:
        signal.alarm(10)  # ends the child in a deadlock
        os._exit(not import_module("slow_here").DONE)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert task.join(10)
    del sys.modules["slow_here"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_does_not_wait_for_hung_call(backend, native_read, gate, monkeypatch):
    """When the disk hangs the host forks nevertheless, and both processes continue."""
    monkeypatch.setattr(fork, "STORE_TIMEOUT", 0.01)
    read, release = gate
    hung = backend.spawn(backend.offload, native_read, read, 1, name="hung")
    backend.sleep(0.05)
    guard = import_module(f"z4j_bare.concurrency.{backend.name}")._store_guard
    pid = os.fork()
    if not pid:
        os._exit(guard.run(int))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    release()
    assert hung.join(10)
    assert guard.run(int) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_loop_ends_in_forked_child(backend, until):
    """The copy of a loop in a child ends at its next wake-up without a further action."""
    read, write = os.pipe()
    writes = []

    def loop():
        while len(writes) < 10_000:
            os.write(write, b"%d\n" % os.getpid())
            writes.append(1)
            backend.sleep(0.01)

    task = backend.spawn(loop, name="loop")
    until(lambda: writes)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        code = 1
        try:
            time.sleep(0.3)  # patched: the copies of the tasks wake
            code = 0 if not task._ended.is_set() else 2
        finally:
            os._exit(code)
    seen = []
    until(lambda: seen.extend(os.waitpid(pid, os.WNOHANG)) or seen[-2], seconds=30)
    assert seen[-1] == 0
    writes.extend([1] * 10_000)
    assert task.join(10)
    assert {int(line) for line in os.read(read, 65536).split()} == {os.getpid()}
    os.close(read)
    os.close(write)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_backend_of_parent_raises_in_child(backend, pair, until):
    """In a child every method that waits raises before it waits, and the epoch differs."""
    ran = []
    calls = [
        lambda: backend.sleep(0),
        lambda: backend.wait(backend.event(), 0),
        lambda: backend.offload(ran.append, 1),
        lambda: backend.wait_readable(pair[0], 0),
        lambda: backend.wait_writable(pair[0], 0),
        lambda: backend.call_blocking(ran.append, 1),
    ]
    before, (read, write) = fork.epoch(), os.pipe()
    pid = os.fork()
    if pid == 0:
        raised = 0
        try:
            for call in calls:
                try:
                    call()
                except ForkedChildError:
                    raised += 1
            os.write(
                write, json.dumps([raised, ran, backend.forked(), fork.epoch() != before]).encode()
            )
        finally:
            os._exit(0)
    os.close(write)
    seen = []
    until(lambda: seen.extend(os.waitpid(pid, os.WNOHANG)) or seen[-2], seconds=30)
    assert json.loads(os.read(read, 65536)) == [len(calls), [], True, True]
    os.close(read)
    assert not backend.forked()
    assert fork.epoch() == before
