"""The backend in the mode of this run, the choice of a backend, and the one with virtual time."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
from greenlet import getcurrent

from z4j_bare.agent import Agent
from z4j_bare.buffer.files import is_owned, lock_path, new_store_path
from z4j_bare.buffer.store import BufferStore
from z4j_bare.concurrency import CHOICES, Detection, build, choose, detect, fork
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.control import write_pidfile
from z4j_bare.errors import ForkedChildError, HostConfigurationError
from z4j_bare.native_schedules import NativeScheduleControl


@pytest.fixture
def native_read(mode):
    """``os.read`` as the operating system has it: it blocks the native thread that calls it."""
    if mode == "gevent":
        from gevent.monkey import get_original

        return get_original("os", "read")
    if mode == "eventlet":
        from eventlet.patcher import original

        return original("os").read
    return os.read


@pytest.fixture
def gate():
    """A pipe to block on: ``(read end, open it)``."""
    read, write = os.pipe()
    yield read, lambda: os.write(write, b"x")
    os.close(read)
    os.close(write)


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


# -- tasks


def test_spawn_runs_and_ends(backend):
    """A task gets its arguments, is alive until it returns, and join says so."""
    go, got = backend.event(), []

    def work(*args):
        go.wait(10)
        got.extend(args)

    task = backend.spawn(work, 1, 2, name="worker")
    assert (task.name, task.alive()) == ("worker", True)
    assert task.join(0.01) is False
    go.set()
    assert task.join(10) is True
    assert (task.alive(), got) == (False, [1, 2])


def test_an_escaped_error_is_logged_once(backend, caplog):
    """An error that leaves a task is one log line with the task's name, and the task counts as ended."""

    def fail():
        raise ValueError("on purpose")

    assert backend.spawn(fail, name="z4j-failing").join(10)
    lines = [record for record in caplog.records if "z4j-failing" in record.getMessage()]
    assert len(lines) == 1
    assert "on purpose" in caplog.text


def test_tasks_do_not_keep_the_process(mode, tmp_path):
    """A process with a task that never ends exits when its main program does."""
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


def test_sleep_lets_others_run(backend):
    """sleep(0) yields: two tasks that do so in turns both get on."""
    order = []

    def count(name):
        for _ in range(3):
            order.append(name)
            backend.sleep(0.001)

    tasks = [backend.spawn(count, name, name=name) for name in "ab"]
    assert all(task.join(10) for task in tasks)
    assert sorted(order) == ["a"] * 3 + ["b"] * 3


def test_clocks(backend):
    """now() is for intervals and never goes back; wall() is the time of day."""
    first = backend.now()
    backend.sleep(0.01)
    assert backend.now() > first
    assert abs(backend.wall() - time.time()) < 60


# -- events


def test_event_states(backend):
    """An event remembers that it was set until it is cleared."""
    event = backend.event()
    assert (event.is_set(), event.wait(0.01)) == (False, False)
    event.set()
    event.set()
    assert (event.is_set(), event.wait(0), event.wait(None)) == (True, True, True)
    event.clear()
    assert (event.is_set(), event.wait(0)) == (False, False)


def test_event_wakes_every_waiter(backend):
    """All waiters wake, with and without a time-out, also after others have given up before."""
    event, woken = backend.event(), []
    tasks = [
        backend.spawn(lambda: woken.append(backend.wait(event, None)), name="w") for _ in range(3)
    ]
    tasks += [
        backend.spawn(lambda: woken.append(backend.wait(event, 20)), name="w") for _ in range(3)
    ]
    tasks += [backend.spawn(lambda: backend.wait(event, 0.01), name="gives-up") for _ in range(3)]
    backend.sleep(0.1)
    event.set()
    assert all(task.join(10) for task in tasks)
    assert woken == [True] * 6


def test_set_never_switches(backend, mode):
    """set() returns before any waiter has run: it may be called where switching is forbidden."""
    if mode == "threads":
        pytest.skip("threads run whenever they like")
    event, woken = backend.event(), []
    task = backend.spawn(lambda: woken.append(event.wait(10)), name="w")
    backend.sleep(0.01)
    event.set()
    assert woken == []
    assert task.join(10)
    assert woken == [True]


def test_set_from_a_native_thread(backend):
    """A flag raised in a native thread is seen soon, even by a waiter that would wait for ever."""
    event, seen = backend.event(), []
    task = backend.spawn(lambda: seen.append(backend.wait(event, None)), name="w")
    backend.sleep(0.02)
    assert backend.offload(event.set) == (True, None)
    assert task.join(10)
    assert seen == [True]


def test_set_and_clear_in_a_hurry(backend):
    """A waiter and a setter that clear and set a thousand times never lose each other."""
    ping, pong, turns = backend.event(), backend.event(), 300

    def answer():
        for _ in range(turns):
            assert backend.wait(ping, 10)
            ping.clear()
            pong.set()

    task = backend.spawn(answer, name="answer")
    for _ in range(turns):
        ping.set()
        assert backend.wait(pong, 10)
        pong.clear()
    assert task.join(10)


def test_who_does_not_wait_is_stuck(backend, until):
    """A task held up by what the backend knows nothing of is stuck; one that waits through the backend, or has ended, is not."""
    bell, begun = backend.event(), []

    def task(wait):
        begun.append(wait)
        wait(bell, 20)

    held = backend.spawn(task, lambda event, seconds: event.wait(seconds), name="held")
    waiting = backend.spawn(task, backend.wait, name="waiting")
    until(lambda: len(begun) == 2 and held.stuck(0.02) and not waiting.stuck(0))
    assert not held.stuck(20)
    assert not waiting.stuck(0)
    bell.set()
    assert held.join(10)
    assert waiting.join(10)
    assert not held.stuck(0)


def test_an_agent_names_the_loops_that_do_not_go_on(backend):
    """Of an agent's loops one that has ended is named; of a session's, which come and go, it is not, nor is one that waits."""
    bell = backend.event()
    ended, waiting = (
        backend.spawn(int, name="ended"),
        backend.spawn(backend.wait, bell, 20, name="waiting"),
    )
    assert ended.join(10)
    assert Agent.stuck(SimpleNamespace(_tasks=[ended, waiting], _chores=[]), 20) == ["ended"]
    assert Agent.stuck(SimpleNamespace(_tasks=[waiting], _chores=[ended]), 20) == []
    bell.set()
    assert waiting.join(10)


# -- locks and offloading


def test_locks_exclude(backend):
    """Two tasks never hold one lock, although both yield inside it."""
    lock, inside, most = backend.lock(), [], []

    def work():
        for _ in range(20):
            with lock:
                inside.append(1)
                most.append(len(inside))
                backend.sleep(0)
                inside.pop()

    tasks = [backend.spawn(work, name="w") for _ in range(4)]
    assert all(task.join(20) for task in tasks)
    assert set(most) == {1}


def test_offload_returns_outcomes_as_values(backend):
    """A result comes back as a value and so does an error: an exception in a native thread would be printed or lost."""
    assert backend.offload(divmod, 7, 2) == (True, (3, 1))
    ok, error = backend.offload(divmod, 7, 0)
    assert (ok, type(error)) == (False, ZeroDivisionError)


def test_offload_does_not_stall_the_others(backend, native_read, gate):
    """While an offloaded call blocks its native thread, another task keeps ticking."""
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


def test_offload_is_one_at_a_time(backend):
    """Calls from several tasks never overlap: SQLite gets one transaction at a time."""
    inside, overlaps = [], []

    def pure():
        inside.append(1)
        overlaps.append(len(inside))
        sum(range(20_000))
        inside.pop()

    tasks = [backend.spawn(backend.offload, pure, name="w") for _ in range(8)]
    assert all(task.join(20) for task in tasks)
    assert set(overlaps) == {1}


def test_offload_stays_on_one_thread(backend):
    """One task's calls all run on the same native thread: each more would get memory of its own for SQLite."""
    assert len({backend.offload(backend.native_ident) for _ in range(30)}) == 1


def test_files_leave_no_hub_on_the_native_thread(backend, mode, tmp_path):
    """Files of ours that are opened off eventlet's hub give that thread none: greenlet would search the heap for it at the end."""
    if mode != "eventlet":
        pytest.skip("only eventlet's os.open looks for a hub")
    from eventlet import hubs

    def opened():
        write_pidfile("django")
        store = BufferStore(new_store_path(tmp_path), deployment="p")
        owned = is_owned(lock_path(store.path))
        store.close()
        NativeScheduleControl(tmp_path / "schedules.db")
        return owned, hasattr(hubs._threadlocal, "hub")

    gc.disable()  # what it finalizes there may be anybody's
    try:
        assert backend.offload(opened) == (True, (True, False))
    finally:
        gc.enable()


def test_a_call_that_nobody_waits_for_any_more(backend, native_read, gate, mode, until):
    """Whoever is killed while he waits for an offloaded call leaves nothing that the next one takes for his own."""
    if mode == "threads":
        pytest.skip("nobody can kill a thread")
    read, release = gate
    kill, begun = import_module(mode).kill, []

    def impatient():
        begun.append(getcurrent())
        backend.offload(native_read, read, 1)

    task = backend.spawn(impatient, name="impatient")
    until(lambda: begun)
    backend.sleep(0.05)
    kill(begun[0])
    assert task.join(10)
    release()
    assert [backend.offload(divmod, number, 1) for number in range(5)] == [
        (True, (number, 0)) for number in range(5)
    ]
    backend.close()


def test_close_does_not_wait_for_a_hung_call(backend, native_read, gate, mode):
    """close() returns although an offloaded call hangs in the disk: stop() is bounded."""
    if mode == "threads":
        pytest.skip("there is no helper to give back: the call runs in its caller's own thread")
    read, release = gate
    hung = backend.spawn(backend.offload, native_read, read, 1, name="hung")
    backend.sleep(0.05)
    closing = backend.spawn(backend.close, name="close")
    try:
        assert closing.join(5)
    finally:
        release()
    assert hung.join(10)


# -- input and output


def test_waiting_for_a_socket(backend, pair):
    """Readiness is reported as it is, and its absence after the time-out."""
    left, right = pair
    assert backend.wait_readable(left, 0.01) is False
    assert backend.wait_writable(left, 1) is True
    right.send(b"x")
    assert backend.wait_readable(left, 10) is True


def test_a_waiter_wakes_when_bytes_come(backend, pair):
    """A task that waits for a socket wakes when something arrives, and when the other end hangs up."""
    left, right = pair
    woken = []
    task = backend.spawn(lambda: woken.append(backend.wait_readable(left, 20)), name="reader")
    backend.sleep(0.02)
    right.shutdown(socket.SHUT_RDWR)
    assert task.join(10)
    assert woken == [True]


# -- steps


def burn(seconds):
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        pass


def test_steps_are_timed(backend):
    """The longest stretch between two yields is kept with its task's name, until somebody takes it."""

    def greedy():
        backend.sleep(0)
        burn(0.05)
        backend.sleep(0)

    assert backend.spawn(greedy, name="greedy").join(10)
    longest, name = backend.steps.drain()
    assert longest >= 0.05
    assert name == "greedy"
    assert backend.steps.drain() == (0.0, "")


def test_the_last_step_is_timed(backend):
    """What a task does between its last wait and its end is a step like any other."""
    assert backend.spawn(burn, 0.05, name="ending").join(10)
    assert backend.steps.drain()[0] >= 0.05


def test_a_hub_calls_what_its_timer_says(backend, mode, until):
    """A timer's function is called again and again until it is ended, by the hub; threads have none."""
    calls = []
    end = backend.timer(0.01, lambda: calls.append(getcurrent()))
    if mode == "threads":
        assert end is None
        return
    until(lambda: len(calls) >= 3)
    assert getcurrent() not in calls
    end()
    seen = len(calls)
    backend.sleep(0.1)
    assert len(calls) == seen


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_a_timer_may_be_for_once(backend, mode, until, seconds):
    """Such a one is called a single time, and may be ended before that; what ends it does no harm afterwards."""
    calls = []
    first = backend.timer(seconds, lambda: calls.append("first"), once=True)
    second = backend.timer(0.05, lambda: calls.append("second"), once=True)
    if mode == "threads":
        assert first is None is second
        return
    second()
    until(lambda: calls)
    first()
    backend.sleep(0.1)
    assert calls == ["first"]


def test_a_childs_copy_of_a_timer_is_dead(backend, mode, until):
    """A forked child's hub calls nothing of its parent's."""
    if mode == "threads":
        pytest.skip("threads have no hub")
    calls = []
    end = backend.timer(0.01, lambda: calls.append(os.getpid()))
    until(lambda: calls)
    pid = os.fork()
    if pid == 0:
        calls.clear()
        time.sleep(0.2)  # patched: the child's hub runs
        os._exit(len(calls))
    assert os.waitpid(pid, 0)[1] == 0
    calls.clear()
    until(lambda: calls)
    end()


def test_a_large_import_yields(backend, mode, tmp_path, monkeypatch):
    """Under gevent others run between the files of an import; everywhere it happens once, and all get it whole."""
    package = tmp_path / "z4j_large"
    package.mkdir()
    for name in "abc":
        (package / f"{name}.py").touch()
    (package / "__init__.py").write_text(
        "import sys\nsys.z4j_begun += 1\nfrom z4j_large import a, b, c\nWHOLE = True\n"
    )
    monkeypatch.setattr(sys, "z4j_begun", 0, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    ran, found = [], []

    def count():
        while loading.alive():
            ran.append(1)
            backend.sleep(0)

    def also():
        import z4j_large

        found.append(z4j_large.WHOLE)

    loading = backend.spawn(
        lambda: found.append(backend.import_module("z4j_large").WHOLE), name="loading"
    )
    tasks = [backend.spawn(count, name="count"), backend.spawn(also, name="also"), loading]
    assert all(task.join(10) for task in tasks)
    assert (found, sys.z4j_begun) == ([True, True], 1)
    assert mode != "gevent" or len(ran) > 3
    assert not [finder for finder in sys.meta_path if "_Pauses" in repr(finder)]


def test_waiting_inside_of_foreign_code_ends_no_step(backend):
    """Foreign code that waits and then calls us back, where we wait, has no step counted for its own time."""

    def foreign():
        backend.event().wait(0.3)
        backend.sleep(0.001)

    def work():
        backend.call_blocking(foreign)
        backend.sleep(0)

    backend.steps.drain()
    assert backend.spawn(work, name="calls").join(10)
    assert backend.steps.drain()[0] < 0.2


def test_waiting_is_no_step(backend):
    """No wait counts as a step of ours: not for time, an event, a lock or the end of a task, nor a foreign call."""

    def patient():
        backend.sleep(0.3)
        backend.wait(backend.event(), 0.3)
        backend.call_blocking(backend.event().wait, 0.3)
        backend.call_blocking(
            backend.wait, backend.event(), 0.3
        )  # foreign code that comes back to the backend
        with lock:
            other.join(10)

    lock = backend.lock()
    lock.__enter__()
    other = backend.spawn(
        lambda: (backend.sleep(0.3), lock.__exit__(None, None, None), backend.sleep(0.3)),
        name="other",
    )
    assert backend.spawn(patient, name="patient").join(10)
    assert backend.steps.drain()[0] < 0.25


# -- forks


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_no_fork_in_the_middle_of_an_offloaded_call(backend, until):
    """A child never begins inside an offloaded call: SQLite's locks would be shut in it for ever, for the host as well."""
    steps = []

    def native():
        steps.append("in")
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            pass
        steps.append("out")

    def child_of_a_busy_moment():
        steps.clear()
        task = backend.spawn(backend.offload, native, name="busy")
        until(lambda: steps)
        pid = os.fork()
        if not pid:
            os._exit(steps != ["in", "out"])
        assert task.join(10)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert [child_of_a_busy_moment() for _ in range(3)] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_no_fork_in_the_middle_of_an_import(backend, mode, until, tmp_path, monkeypatch):
    """A module that a task of ours imports can be imported in a child that was forked meanwhile."""
    if mode != "threads":
        pytest.skip("the greenlet that imports is there in the child as well")
    (tmp_path / "slow_here.py").write_text("import time\ntime.sleep(0.3)\nDONE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = backend.spawn(import_module, "slow_here", name="importer")
    until(lambda: "slow_here" in sys.modules)
    pid = os.fork()
    if not pid:
        signal.alarm(10)  # else it would wait for ever
        os._exit(not import_module("slow_here").DONE)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert task.join(10)
    del sys.modules["slow_here"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_hung_call_does_not_hold_up_a_fork(backend, native_read, gate, monkeypatch):
    """When the disk hangs the host forks all the same, and both processes can go on."""
    monkeypatch.setattr(fork, "STORE_TIMEOUT", 0.01)
    read, release = gate
    hung = backend.spawn(backend.offload, native_read, read, 1, name="hung")
    backend.sleep(0.05)
    shut = import_module(f"z4j_bare.concurrency.{backend.name}")._store_guard
    pid = os.fork()
    if not pid:
        os._exit(shut.run(int))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    release()
    assert hung.join(10)
    assert shut.run(int) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_loops_leave_a_forked_child(backend, until):
    """A loop copied into a child that runs on leaves at its next wake, without a word and without its next action."""
    read, write = os.pipe()
    beats = []

    def loop():
        while len(beats) < 10_000:
            os.write(write, b"%d\n" % os.getpid())
            beats.append(1)
            backend.sleep(0.01)

    task = backend.spawn(loop, name="loop")
    until(lambda: beats)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        code = 1
        try:
            time.sleep(0.3)  # cooperative where it is patched: the copies wake now
            code = 0 if not task._ended.is_set() else 2
        finally:
            os._exit(code)
    seen = []
    until(lambda: seen.extend(os.waitpid(pid, os.WNOHANG)) or seen[-2], seconds=30)
    assert seen[-1] == 0
    beats.extend([1] * 10_000)
    assert task.join(10)
    assert {int(line) for line in os.read(read, 65536).split()} == {os.getpid()}
    os.close(read)
    os.close(write)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_cannot_use_the_parents_seam(backend, pair, until):
    """In a child every method that waits raises before it waits; the child's epoch differs from its parent's."""
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


# -- which backend


def modules(library, *, thread, socket):
    """What ``sys.modules`` holds when ``library`` has patched these."""
    patched = {
        name
        for name, is_patched in (("thread", thread), ("threading", thread), ("socket", socket))
        if is_patched
    }
    if library == "gevent":
        return {"gevent.monkey": SimpleNamespace(is_module_patched=patched.__contains__)}
    return {"eventlet.patcher": SimpleNamespace(is_monkey_patched=patched.__contains__)}


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
@pytest.mark.parametrize(
    ("thread", "socket", "outcome"),
    [
        (True, True, None),
        (True, False, "partial"),
        (False, True, "partial"),
        (False, False, "none"),
    ],
)
def test_detection(library, thread, socket, outcome):
    """Thread and socket together make a runtime, one of them a partial patch, none of them nothing."""
    assert detect(modules(library, thread=thread, socket=socket)).outcome == (outcome or library)


def test_detection_without_libraries():
    """A process that has loaded neither library is plain, and nothing is imported to find out."""
    before = set(sys.modules)
    assert detect({}) == Detection()
    assert detect({"gevent": object(), "eventlet": object()}).outcome == "none"
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("setting", "found", "chosen"),
    [
        ("auto", Detection(), "threads"),
        ("auto", Detection("gevent", True, True), "gevent"),
        ("auto", Detection("eventlet", True, True), "eventlet"),
        ("auto", Detection("gevent", False, True), "threads"),
        ("threads", Detection(), "threads"),
        ("threads", Detection("gevent", False, True), "threads"),
        ("gevent", Detection("gevent", True, True), "gevent"),
        ("gevent", Detection("gevent", False, True), "gevent"),
        ("eventlet", Detection("eventlet", True, True), "eventlet"),
    ],
)
def test_choices(setting, found, chosen):
    """Left to itself it follows what is patched; an override is obeyed where it can work."""
    assert choose(setting, found) == chosen


@pytest.mark.parametrize(
    ("setting", "found", "said"),
    [
        ("auto", Detection("gevent", True, False), "but not sockets"),
        ("auto", Detection("eventlet", True, False), "but not sockets"),
        ("threads", Detection("gevent", True, True), "gevent has patched threads"),
        ("threads", Detection("eventlet", True, True), "eventlet has patched threads"),
        ("gevent", Detection(), "has not patched"),
        ("gevent", Detection("eventlet", True, True), "has not patched"),
        ("eventlet", Detection("gevent", True, True), "has not patched"),
        ("eventlet", Detection(), "has not patched"),
        ("twisted", Detection(), "is not one of auto, threads, gevent, eventlet"),
        ("", Detection(), "is not one of"),
    ],
)
def test_impossible_choices(setting, found, said):
    """What cannot work is refused at start with the setting's name and the reason."""
    with pytest.raises(HostConfigurationError, match="Z4J_CONCURRENCY") as caught:
        choose(setting, found)
    assert said in str(caught.value)


def test_every_choice_is_known():
    """The choices that a message lists are those that can be built, and auto."""
    assert CHOICES == ("auto", "threads", "gevent", "eventlet")
    assert build("threads").name == "threads"


REAL = """
import json, sys, warnings
warnings.simplefilter("ignore")
{patch}
from z4j_bare.concurrency import choose, detect
found = detect()
def attempt(setting):
    try:
        return choose(setting, found)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
print(json.dumps([found.outcome, found.library, attempt("auto"), attempt("threads")]))
"""


@pytest.mark.parametrize(
    ("patch", "outcome", "library", "auto"),
    [
        ("", "none", "", "threads"),
        ("import gevent, eventlet", "none", "", "threads"),
        ("from gevent import monkey; monkey.patch_all()", "gevent", "gevent", "gevent"),
        (
            "from gevent import monkey; monkey.patch_all(thread=False)",
            "partial",
            "gevent",
            "threads",
        ),
        (
            "from gevent import monkey; monkey.patch_all(socket=False)",
            "partial",
            "gevent",
            "HostConfigurationError",
        ),
        ("import eventlet; eventlet.monkey_patch()", "eventlet", "eventlet", "eventlet"),
        ("import eventlet; eventlet.monkey_patch(thread=False)", "partial", "eventlet", "threads"),
        (
            "import eventlet; eventlet.monkey_patch(socket=False)",
            "partial",
            "eventlet",
            "HostConfigurationError",
        ),
    ],
)
def test_detection_in_real_processes(mode, patch, outcome, library, auto):
    """The real libraries, patched fully and partially, are told apart in a process of their own."""
    if mode != "threads":
        pytest.skip("the same sub-processes whatever mode this one is in")
    done = subprocess.run(
        [sys.executable, "-c", REAL.format(patch=patch)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found[:2] == [outcome, library]
    assert found[2].startswith(auto)
    if auto == "HostConfigurationError":
        assert f"{library} has patched threads but not sockets" in found[2]
        assert "Z4J_CONCURRENCY" in found[2]


PARTIAL = """
import sys, warnings
warnings.simplefilter("ignore")
{patch}
from tests.support.engines import FakeEngine
from tests.support.peer import Peer, SECRET_TEXT, TOKEN
import threading
from z4j_bare import AgentRuntime
from z4j_bare.concurrency import build
from z4j_bare.framework import BareFrameworkAdapter
from z4j_core.config import resolve_agent_config
import time
peer = Peer(build("threads"))
config = resolve_agent_config(framework_name="bare", explicit_kwargs=dict(brain_url=peer.url, token=TOKEN, project_id="p", hmac_secret=SECRET_TEXT))
runtime = AgentRuntime(config=config, framework=BareFrameworkAdapter(config), engines=[FakeEngine()])
runtime.start()
deadline = time.monotonic() + 20
while not peer.frames("heartbeat") and time.monotonic() < deadline:
    time.sleep(0.02)
print(len(peer.frames("heartbeat")), runtime.stats()["concurrency"], runtime.stats()["restarts"])
runtime.stop()
peer.stop()
"""


@pytest.mark.parametrize(
    "patch",
    [
        "from gevent import monkey; monkey.patch_all(thread=False)",
        "import eventlet; eventlet.monkey_patch(thread=False)",
    ],
)
def test_threads_work_on_patched_sockets(mode, patch):
    """Where only sockets are patched the agent runs in real threads, and gets a session and a heartbeat through."""
    if mode != "threads":
        pytest.skip("the same sub-processes whatever mode this one is in")
    done = subprocess.run(
        [sys.executable, "-c", PARTIAL.format(patch=patch)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["1", "threads", "{}"]), done.stderr


# -- virtual time


def test_virtual_time_costs_nothing():
    """An hour of a loop passes in no time, wake by wake, and both clocks show it."""
    fake, wakes = FakeConcurrency(start=1000.0), []

    def loop():
        while True:
            fake.sleep(60)
            wakes.append(fake.now())

    fake.spawn(loop, name="loop")
    fake.advance(3600)
    assert wakes == [60.0 * turn for turn in range(1, 61)]
    assert (fake.now(), fake.wall()) == (3600.0, 4600.0)


def test_virtual_tasks_run_in_a_fixed_order():
    """Tasks run in the order in which they were spawned and woke: a test sees the same thing every time."""
    fake, order = FakeConcurrency(), []

    def work(name, seconds):
        fake.sleep(seconds)
        order.append(name)

    for name, seconds in (("late", 3), ("early", 1), ("also-early", 1), ("middle", 2)):
        fake.spawn(work, name, seconds, name=name)
    fake.advance(10)
    assert order == ["early", "also-early", "middle", "late"]


def test_virtual_waits():
    """Events, locks, joins and time-outs all run in virtual time, from a task and from the test itself."""
    fake, got = FakeConcurrency(), []
    event, lock = fake.event(), fake.lock()

    def waiter():
        got.append(("timeout", fake.wait(event, 5), fake.now()))
        got.append(("set", fake.wait(event, 100), fake.now()))
        with lock:
            got.append(("lock", True, fake.now()))

    def setter():
        with lock:
            fake.sleep(8)
            event.set()
            fake.sleep(4)

    task = fake.spawn(waiter, name="w")
    fake.spawn(setter, name="s")
    assert task.join(3) is False
    assert fake.run_until(lambda: len(got) == 3, 60)
    assert got == [("timeout", False, 5.0), ("set", True, 8.0), ("lock", True, 12.0)]
    assert task.join(1) is True
    assert fake.event().wait(2) is False
    assert fake.run_until(lambda: False, 1) is False


def test_virtual_errors_and_steps(caplog):
    """The fake logs a task's error like every backend, offloads as values and knows its own name."""
    fake = FakeConcurrency()

    def fail():
        fake.sleep(1)
        raise ValueError("on purpose")

    assert fake.spawn(fail, name="failing").join(5)
    assert "on purpose" in caplog.text
    assert fake.offload(int, "x")[0] is False
    assert fake.offload(int, "7") == (True, 7)
    assert fake.name == "fake"
