"""Steps, timers and imports, in the backend of this mode."""

import os
import sys
import time

import pytest
from greenlet import getcurrent


def burn(seconds):
    """Compute for ``seconds``."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        pass


def test_longest_step_is_kept_until_drained(backend):
    """The longest step is kept with the name of its task until it is drained."""

    def compute():
        backend.sleep(0)
        burn(0.05)
        backend.sleep(0)

    assert backend.spawn(compute, name="computing").join(10)
    longest, name = backend.steps.drain()
    assert longest >= 0.05
    assert name == "computing"
    assert backend.steps.drain() == (0.0, "")


def test_last_step_of_task_is_measured(backend):
    """The work between the last wait of a task and its end is a step."""
    assert backend.spawn(burn, 0.05, name="ending").join(10)
    assert backend.steps.drain()[0] >= 0.05


def test_hub_timer_repeats_until_cancelled(backend, mode, until):
    """The hub calls the function of a timer until it is cancelled; threads have no timers."""
    calls = []
    cancel = backend.timer(0.01, lambda: calls.append(getcurrent()))
    if mode == "threads":
        assert cancel is None
        return
    until(lambda: len(calls) >= 3)
    assert getcurrent() not in calls
    cancel()
    seen = len(calls)
    backend.sleep(0.1)
    assert len(calls) == seen


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_timer_fires_once(backend, mode, until, seconds):
    """A timer for one call may be cancelled before it and after it."""
    calls = []
    cancel_first = backend.timer(seconds, lambda: calls.append("first"), once=True)
    cancel_second = backend.timer(0.05, lambda: calls.append("second"), once=True)
    if mode == "threads":
        assert cancel_first is None is cancel_second
        return
    cancel_second()
    until(lambda: calls)
    cancel_first()
    backend.sleep(0.1)
    assert calls == ["first"]


def test_timer_does_not_fire_in_forked_child(backend, mode, until):
    """The hub of a forked child calls no timer of the parent."""
    if mode == "threads":
        pytest.skip("threads have no hub")
    calls = []
    cancel = backend.timer(0.01, lambda: calls.append(os.getpid()))
    until(lambda: calls)
    pid = os.fork()
    if pid == 0:
        calls.clear()
        time.sleep(0.2)  # patched, so that the child's hub runs
        os._exit(len(calls))
    assert os.waitpid(pid, 0)[1] == 0
    calls.clear()
    until(lambda: calls)
    cancel()


def test_large_import_yields_and_happens_once(backend, mode, tmp_path, monkeypatch):
    """Under gevent an import yields between files. All tasks get one complete module."""
    package = tmp_path / "z4j_large"
    package.mkdir()
    for name in "abc":
        (package / f"{name}.py").touch()
    (package / "__init__.py").write_text(
        "import sys\nsys.z4j_imports += 1\nfrom z4j_large import a, b, c\nCOMPLETE = True\n"
    )
    monkeypatch.setattr(sys, "z4j_imports", 0, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    ran, found = [], []

    def count():
        while loading.alive():
            ran.append(1)
            backend.sleep(0)

    def import_again():
        import z4j_large

        found.append(z4j_large.COMPLETE)

    loading = backend.spawn(
        lambda: found.append(backend.import_module("z4j_large").COMPLETE), name="loading"
    )
    tasks = [backend.spawn(count, name="count"), backend.spawn(import_again, name="again"), loading]
    assert all(task.join(10) for task in tasks)
    assert (found, sys.z4j_imports) == ([True, True], 1)
    assert mode != "gevent" or len(ran) > 3
    assert not [finder for finder in sys.meta_path if "_YieldingFinder" in repr(finder)]


def test_wait_inside_foreign_code_ends_no_step(backend):
    """The time of foreign code that calls the backend is not counted as a step."""

    def foreign():
        backend.event().wait(0.3)
        backend.sleep(0.001)

    def work():
        backend.call_blocking(foreign)
        backend.sleep(0)

    backend.steps.drain()
    assert backend.spawn(work, name="calls").join(10)
    assert backend.steps.drain()[0] < 0.2


def test_waits_are_no_steps(backend):
    """No wait is a step: for time, an event, a lock, the end of a task, or a foreign call."""

    def waiter():
        backend.sleep(0.3)
        backend.wait(backend.event(), 0.3)
        backend.call_blocking(backend.event().wait, 0.3)
        # foreign code that calls the backend
        backend.call_blocking(backend.wait, backend.event(), 0.3)
        with lock:
            other.join(10)

    lock = backend.lock()
    lock.__enter__()
    other = backend.spawn(
        lambda: (backend.sleep(0.3), lock.__exit__(None, None, None), backend.sleep(0.3)),
        name="other",
    )
    assert backend.spawn(waiter, name="waiter").join(10)
    assert backend.steps.drain()[0] < 0.25
