"""The lag of the hub, and the code that blocks it."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.concurrency.stacks import read_stack
from z4j_bare.monitoring.holds import Sample
from z4j_bare.monitoring.hub_lag import (
    BLOCKED_AFTER,
    STACK_SAMPLE_INTERVAL,
    TICK,
    HubLagMonitor,
    LagHistory,
    describe,
    next_check,
)


def unpatched_sleep(mode):
    """Return the sleep that blocks the whole hub."""
    if mode == "gevent":
        from gevent.monkey import get_original

        return get_original("time", "sleep")
    from eventlet import patcher

    return patcher.original("time").sleep


@pytest.fixture
def monitor(backend, until):
    """A running monitor."""
    created, stop_event = HubLagMonitor(backend), backend.event()
    task = backend.spawn(created.run, stop_event, name="hub-lag")
    until(lambda: created._due)
    yield created
    stop_event.set()
    created.wake()
    until(lambda: not task.alive())


def test_monitor_names_code_that_blocks_hub(monitor, mode, until):
    """The native thread finds the code that keeps the hub from running for seconds."""
    if mode == "threads":
        pytest.skip("there is no hub: a task that does not yield blocks no other task")
    sleep = unpatched_sleep(mode)

    def hog():
        sleep(3.0)

    hog()
    until(lambda: len(monitor._samples) >= 2)
    p99, longest, blocking_code = monitor.drain()
    assert p99 == longest > BLOCKED_AFTER
    assert blocking_code.endswith("in hog")
    assert monitor.drain()[2] == ""


def test_monitor_names_no_code_while_hub_is_on_time(monitor, until):
    """Ticks on time give samples and no blocking code."""
    until(lambda: len(monitor._samples) >= 1)
    p99, longest, blocking_code = monitor.drain()
    assert 0.0 <= p99 <= longest
    assert blocking_code == ""


@given(st.floats(-TICK, 10.0))
def test_next_check_follows_blocking_within_one_interval(lag):
    """At the next check the lag exceeds ``BLOCKED_AFTER`` by one sampling interval at most."""
    delay = next_check(lag)
    assert STACK_SAMPLE_INTERVAL / 10 <= delay <= TICK + BLOCKED_AFTER + STACK_SAMPLE_INTERVAL
    assert lag + delay <= max(lag, BLOCKED_AFTER) + STACK_SAMPLE_INTERVAL


def test_describe_includes_celery_task_and_id():
    """``describe`` names the running task, if there is one, and the position."""
    stack = tuple(read_stack(sys._getframe()))
    text = describe(Sample(0.0, stack, "shop.pay[id-1]"))
    assert text.startswith("shop.pay[id-1] at ")
    assert text.endswith("in test_describe_includes_celery_task_and_id")
    assert describe(Sample(0.0, stack, "")).startswith("tests/unit/monitoring/")


def test_history_has_quantiles_and_histogram():
    """The history since the start keeps a histogram, and exact quantiles of the last lags."""
    history = LagHistory()
    assert history.describe()["max_seconds"] == 0.0
    for lag in (0.0004, 0.0004, 0.03, 3.0):
        history.add(lag)
    found = history.describe()
    assert (found["samples"], found["max_seconds"]) == (4, 3.0)
    assert (found["p50_seconds"], found["p99_seconds"]) == (0.001, 3.0)
    assert found["histogram"]["0.001"] == 2
    assert found["histogram"]["0.05"] == found["histogram"]["5"] == 1
    assert found["recent"]["p50_seconds"] == 0.03
