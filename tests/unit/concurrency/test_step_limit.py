"""The judge of steps itself: it has to see what it is there for, and nothing else."""

import gc
import time

import pytest

from tests.support import steps


@pytest.fixture
def trial(backend, mode):
    """``trial(function)``: run it as a task of ours; return the verdicts."""
    if mode == "threads":
        pytest.skip("nobody waits for our steps there")

    def run(function, times=1):
        checker = steps.StepLimitChecker()
        try:
            checker.watch(backend)
            for _ in range(times):
                assert backend.spawn(function, name="z4j-accused").join(20)
        finally:
            checker.stop()
        return checker.violations

    return run


@pytest.fixture
def block(mode):
    """``time.sleep`` as the C library has it."""
    if mode == "gevent":
        from gevent.monkey import get_original

        return get_original("time", "sleep")
    if mode == "eventlet":
        from eventlet.patcher import original

        return original("time").sleep
    return time.sleep


def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_computing_is_seen(trial, backend):
    """A step that computes for too long is guilty on both clocks, with the task and the place where it ended."""
    verdicts = trial(lambda: (backend.sleep(0), burn(0.03), backend.sleep(0)))
    assert [
        kind for verdict in verdicts for kind in ("two waits", "two switches") if kind in verdict
    ] == ["two waits", "two switches"]
    assert all(
        verdict.startswith("z4j-accused: 3") and "test_step_limit.py" in verdict
        for verdict in verdicts
    )


def test_computing_a_little_too_long_is_seen_by_repetition(trial, backend):
    """A step of 15 ms may be the machine's fault once; in the same place again and again it is not."""
    verdicts = trial(lambda: (backend.sleep(0), burn(0.015), backend.sleep(0)), times=steps.REPEATS)
    assert verdicts


def test_computing_in_a_foreign_call_is_seen(trial, backend):
    """What foreign code computes inside a wait of ours is seen by the clock that follows the switches."""
    verdicts = trial(
        lambda: backend.call_blocking(lambda: (backend.sleep(0), burn(0.03), backend.sleep(0)))
    )
    assert len(verdicts) == 1
    assert "two switches" in verdicts[0]


def test_blocking_is_seen(trial, block):
    """A step that blocks its thread in the kernel is guilty at once when it is long, and by repetition when it is short."""
    assert trial(lambda: block(steps.SURE_BLOCKED + 0.1))
    assert trial(lambda: block(0.03), times=steps.REPEATS)


def test_yielding_is_innocent(trial, backend):
    """Neither much work in small steps nor long waits are an offence."""
    assert (
        trial(lambda: [(burn(0.002), backend.sleep(0)) for _ in range(50)] and backend.sleep(0.2))
        == []
    )


def test_the_collector_is_an_excuse(trial):
    """A collection of a large heap in our step is everybody's garbage."""
    heap = [[[]] for _ in range(1_000_000)]
    assert trial(gc.collect) == []
    del heap
