"""Tasks, events, locks, offloaded calls and waits for sockets, in the backend of this mode."""

import gc
import socket
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
from greenlet import getcurrent

from z4j_bare.buffer.files import is_owned, lock_path, new_store_path
from z4j_bare.buffer.store import BufferStore
from z4j_bare.control import write_pidfile
from z4j_bare.native_schedules import NativeScheduleControl
from z4j_bare.pipeline.session import BackgroundLoops, SessionLoops


def test_task_gets_arguments_and_is_alive_until_return(backend):
    """A task gets its arguments and is alive until it returns; ``join`` reports that."""
    go, received = backend.event(), []

    def work(*args):
        go.wait(10)
        received.extend(args)

    task = backend.spawn(work, 1, 2, name="worker")
    assert (task.name, task.alive()) == ("worker", True)
    assert task.join(0.01) is False
    go.set()
    assert task.join(10) is True
    assert (task.alive(), received) == (False, [1, 2])


def test_escaped_error_is_logged_once(backend, caplog):
    """An error that leaves a task is logged once with the task's name, and the task has ended."""

    def fail():
        raise ValueError("on purpose")

    assert backend.spawn(fail, name="z4j-failing").join(10)
    records = [record for record in caplog.records if "z4j-failing" in record.getMessage()]
    assert len(records) == 1
    assert "on purpose" in caplog.text


def test_endless_task_does_not_keep_process_alive(mode, tmp_path):
    """A process with an endless task exits when its main program ends."""
    code = (
        "import sys; from tests.launch import patch; patch(sys.argv[1])\n"
        "from z4j_bare.concurrency import build\n"
        "backend = build(sys.argv[1]); never = backend.event()\n"
        "backend.spawn(backend.wait, never, name='endless'); backend.sleep(0.05); print('done')"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, mode],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "done"), ended.stderr


def test_sleep_runs_other_tasks(backend):
    """Two tasks that sleep in turns both make progress."""
    order = []

    def count(name):
        for _ in range(3):
            order.append(name)
            backend.sleep(0.001)

    tasks = [backend.spawn(count, name, name=name) for name in "ab"]
    assert all(task.join(10) for task in tasks)
    assert sorted(order) == ["a"] * 3 + ["b"] * 3


def test_now_is_monotonic_and_wall_is_time_of_day(backend):
    """``now`` increases, and ``wall`` is the time of day."""
    first = backend.now()
    backend.sleep(0.01)
    assert backend.now() > first
    assert abs(backend.wall() - time.time()) < 60


def test_event_stays_set_until_cleared(backend):
    """An event stays set until it is cleared."""
    event = backend.event()
    assert (event.is_set(), event.wait(0.01)) == (False, False)
    event.set()
    event.set()
    assert (event.is_set(), event.wait(0), event.wait(None)) == (True, True, True)
    event.clear()
    assert (event.is_set(), event.wait(0)) == (False, False)


def test_event_wakes_all_waiters(backend):
    """All waiters wake, with and without a timeout, also after others have timed out."""
    event, woken = backend.event(), []
    tasks = [
        backend.spawn(lambda: woken.append(backend.wait(event, None)), name="w") for _ in range(3)
    ]
    tasks += [
        backend.spawn(lambda: woken.append(backend.wait(event, 20)), name="w") for _ in range(3)
    ]
    tasks += [backend.spawn(lambda: backend.wait(event, 0.01), name="timeout") for _ in range(3)]
    backend.sleep(0.1)
    event.set()
    assert all(task.join(10) for task in tasks)
    assert woken == [True] * 6


def test_set_does_not_switch_tasks(backend, mode):
    """``set`` returns before a waiter runs, so it may be called where switching is forbidden."""
    if mode == "threads":
        pytest.skip("the system may run another thread at any time")
    event, woken = backend.event(), []
    task = backend.spawn(lambda: woken.append(event.wait(10)), name="w")
    backend.sleep(0.01)
    event.set()
    assert woken == []
    assert task.join(10)
    assert woken == [True]


def test_waiter_sees_event_that_native_thread_sets(backend):
    """A waiter without a timeout soon sees a flag that a native thread sets."""
    event, seen = backend.event(), []
    task = backend.spawn(lambda: seen.append(backend.wait(event, None)), name="w")
    backend.sleep(0.02)
    assert backend.offload(event.set) == (True, None)
    assert task.join(10)
    assert seen == [True]


def test_no_wakeup_is_lost_in_rapid_set_and_clear(backend):
    """A waiter and a setter exchange 300 signals without losing one."""
    ping, pong, rounds = backend.event(), backend.event(), 300

    def answer():
        for _ in range(rounds):
            assert backend.wait(ping, 10)
            ping.clear()
            pong.set()

    task = backend.spawn(answer, name="answer")
    for _ in range(rounds):
        ping.set()
        assert backend.wait(pong, 10)
        pong.clear()
    assert task.join(10)


def test_task_is_stuck_unless_it_waits_through_backend(backend, until):
    """A task is stuck in a wait that the backend does not know, but not in the backend's own."""
    event, started = backend.event(), []

    def task(wait):
        started.append(wait)
        wait(event, 20)

    blocked = backend.spawn(task, lambda flag, seconds: flag.wait(seconds), name="blocked")
    waiting = backend.spawn(task, backend.wait, name="waiting")
    until(lambda: len(started) == 2 and blocked.stuck(0.02) and not waiting.stuck(0))
    assert not blocked.stuck(20)
    assert not waiting.stuck(0)
    event.set()
    assert blocked.join(10)
    assert waiting.join(10)
    assert not blocked.stuck(0)


def test_stuck_names_ended_background_loop_but_not_session_loop(backend):
    """An ended background loop is stuck. An ended session loop is not, nor is a waiting loop."""
    event = backend.event()
    ended, waiting = (
        backend.spawn(int, name="ended"),
        backend.spawn(backend.wait, event, 20, name="waiting"),
    )
    assert ended.join(10)
    assert BackgroundLoops.stuck(SimpleNamespace(_tasks=[ended, waiting]), 20) == {"ended"}
    assert SessionLoops.stuck(SimpleNamespace(_tasks=[ended, waiting]), 20) == set()
    event.set()
    assert waiting.join(10)


def test_lock_excludes_other_tasks(backend):
    """Two tasks never hold one lock, although both yield inside it."""
    lock, inside, holders = backend.lock(), [], []

    def work():
        for _ in range(20):
            with lock:
                inside.append(1)
                holders.append(len(inside))
                backend.sleep(0)
                inside.pop()

    tasks = [backend.spawn(work, name="w") for _ in range(4)]
    assert all(task.join(20) for task in tasks)
    assert set(holders) == {1}


def test_offload_returns_result_or_error_as_value(backend):
    """An exception is returned as a value, because a native thread would print or lose it."""
    assert backend.offload(divmod, 7, 2) == (True, (3, 1))
    ok, error = backend.offload(divmod, 7, 0)
    assert (ok, type(error)) == (False, ZeroDivisionError)


def test_offload_does_not_block_other_tasks(backend, native_read, gate):
    """Another task runs while an offloaded call blocks its native thread."""
    read, release = gate
    ticks = []

    def tick():
        while len(ticks) < 20:
            ticks.append(1)
            backend.sleep(0.005)
        release()

    task = backend.spawn(tick, name="ticker")
    assert backend.offload(native_read, read, 1) == (True, b"x")
    assert len(ticks) == 20
    assert task.join(10)


def test_offload_runs_one_call_at_a_time(backend):
    """Calls from several tasks never overlap, so SQLite has one transaction at a time."""
    inside, overlaps = [], []

    def pure():
        inside.append(1)
        overlaps.append(len(inside))
        sum(range(20_000))
        inside.pop()

    tasks = [backend.spawn(backend.offload, pure, name="w") for _ in range(8)]
    assert all(task.join(20) for task in tasks)
    assert set(overlaps) == {1}


def test_offload_uses_one_thread(backend):
    """All calls run on one native thread, because SQLite allocates memory for each thread."""
    assert len({backend.offload(backend.native_ident) for _ in range(30)}) == 1


def test_opening_files_creates_no_hub_on_native_thread(backend, mode, tmp_path):
    """The agent opens files without a hub of eventlet in the native thread.

    greenlet would search the heap for that hub when the thread ends.
    """
    if mode != "eventlet":
        pytest.skip("only eventlet's os.open creates a hub")
    from eventlet import hubs

    def open_files():
        write_pidfile("django")
        store = BufferStore(new_store_path(tmp_path), deployment="p")
        owned = is_owned(lock_path(store.path))
        store.close()
        NativeScheduleControl(tmp_path / "schedules.db")
        return owned, hasattr(hubs._threadlocal, "hub")

    gc.disable()  # the collector would run finalizers of other tests on the native thread
    try:
        assert backend.offload(open_files) == (True, (True, False))
    finally:
        gc.enable()


def test_offload_ignores_result_of_killed_caller(backend, native_read, gate, mode, until):
    """The next caller does not get the result of a call whose caller was killed."""
    if mode == "threads":
        pytest.skip("a thread cannot be killed")
    read, release = gate
    kill, started = import_module(mode).kill, []

    def caller():
        started.append(getcurrent())
        backend.offload(native_read, read, 1)

    task = backend.spawn(caller, name="caller")
    until(lambda: started)
    backend.sleep(0.05)
    kill(started[0])
    assert task.join(10)
    release()
    assert [backend.offload(divmod, number, 1) for number in range(5)] == [
        (True, (number, 0)) for number in range(5)
    ]
    backend.close()


def test_close_does_not_wait_for_hung_call(backend, native_read, gate, mode):
    """``close`` returns although an offloaded call hangs in the disk."""
    if mode == "threads":
        pytest.skip("there is no native helper thread: the call runs in the thread of its caller")
    read, release = gate
    hung = backend.spawn(backend.offload, native_read, read, 1, name="hung")
    backend.sleep(0.05)
    closing = backend.spawn(backend.close, name="close")
    try:
        assert closing.join(5)
    finally:
        release()
    assert hung.join(10)


def test_wait_reports_whether_socket_is_ready(backend, pair):
    """A wait returns whether the socket is ready, and ``False`` after the timeout."""
    left, right = pair
    assert backend.wait_readable(left, 0.01) is False
    assert backend.wait_writable(left, 1) is True
    right.send(b"x")
    assert backend.wait_readable(left, 10) is True


def test_reader_wakes_when_peer_disconnects(backend, pair):
    """A task that waits for a socket wakes when the other end shuts down."""
    left, right = pair
    woken = []
    task = backend.spawn(lambda: woken.append(backend.wait_readable(left, 20)), name="reader")
    backend.sleep(0.02)
    right.shutdown(socket.SHUT_RDWR)
    assert task.join(10)
    assert woken == [True]
