"""The checker of step times: it finds long steps of the agent, and only those."""

import gc
import time

import pytest

from tests.support import steps


@pytest.fixture
def check(backend, mode):
    """``check(function)``: run it as a task of the agent; return the violations."""
    if mode == "threads":
        pytest.skip("without a hub a step blocks no other task")

    def run(function, times=1):
        checker = steps.StepLimitChecker()
        try:
            checker.watch(backend)
            for _ in range(times):
                assert backend.spawn(function, name="z4j-checked").join(20)
        finally:
            checker.stop()
        return checker.violations

    return run


@pytest.fixture
def block(mode):
    """The unpatched ``time.sleep``."""
    if mode == "gevent":
        from gevent.monkey import get_original

        return get_original("time", "sleep")
    if mode == "eventlet":
        from eventlet.patcher import original

        return original("time").sleep
    return time.sleep


def burn(seconds):
    """Compute for ``seconds`` of CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_checker_finds_long_computation(check, backend):
    """Both measurements report a long step, with its task and the place of its end."""
    violations = check(lambda: (backend.sleep(0), burn(0.03), backend.sleep(0)))
    assert [
        kind
        for violation in violations
        for kind in ("two waits", "two switches")
        if kind in violation
    ] == ["two waits", "two switches"]
    assert all(
        violation.startswith("z4j-checked: 3") and "test_step_limit.py" in violation
        for violation in violations
    )


def test_checker_finds_repeated_short_computation(check, backend):
    """A step of 15 ms is only reported when it is repeated in the same place."""
    violations = check(
        lambda: (backend.sleep(0), burn(0.015), backend.sleep(0)), times=steps.REPEATS
    )
    assert violations


def test_checker_finds_computation_in_foreign_call(check, backend):
    """The trace of switches reports foreign code that computes inside a wait of the backend."""
    violations = check(
        lambda: backend.call_blocking(lambda: (backend.sleep(0), burn(0.03), backend.sleep(0)))
    )
    assert len(violations) == 1
    assert "two switches" in violations[0]


def test_checker_finds_blocking_calls(check, block):
    """A step that blocks its thread is reported at once if it is long, else when repeated."""
    assert check(lambda: block(steps.IMMEDIATE_BLOCKED + 0.1))
    assert check(lambda: block(0.03), times=steps.REPEATS)


def test_checker_accepts_short_steps_and_long_waits(check, backend):
    """Neither many short steps nor long waits are reported."""
    assert (
        check(lambda: [(burn(0.002), backend.sleep(0)) for _ in range(50)] and backend.sleep(0.2))
        == []
    )


def test_checker_ignores_garbage_collection(check):
    """The collection of a large heap is not charged to the step in which it runs."""
    heap = [[[]] for _ in range(1_000_000)]
    assert check(gc.collect) == []
    del heap
