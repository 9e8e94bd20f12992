"""How late the hub is, and who made it so."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.monitoring.hub_lag import BLOCKED, LOOK, TICK, HubLagMonitor, describe, next_look


def unpatched_sleep(mode):
    """Return the sleep that stops the whole hub."""
    if mode == "gevent":
        from gevent.monkey import get_original

        return get_original("time", "sleep")
    from eventlet import patcher

    return patcher.original("time").sleep


@pytest.fixture
def lateness(backend, until):
    made, stop_event = HubLagMonitor(backend), backend.event()
    task = backend.spawn(made.run, stop_event, name="lateness")
    until(lambda: made._due)
    yield made
    stop_event.set()
    made.wake()
    until(lambda: not task.alive())


def test_who_blocks_the_hub_is_named(lateness, mode, until):
    """Code that keeps the hub from running for seconds is found by a thread that the hub cannot stop."""
    if mode == "threads":
        pytest.skip("there is no hub: a task that does not yield blocks nobody else")
    sleep = unpatched_sleep(mode)

    def hog():
        sleep(3.0)

    hog()
    until(lambda: len(lateness._samples) >= 2)
    p99, longest, culprit = lateness.take()
    assert p99 == longest > BLOCKED
    assert culprit.endswith("in hog")
    assert lateness.take()[2] == ""


def test_a_hub_on_time_accuses_nobody(lateness, until):
    """Ticks on time are samples without a culprit; each report begins anew."""
    until(lambda: len(lateness._samples) >= 1)
    p99, longest, culprit = lateness.take()
    assert 0.0 <= p99 <= longest
    assert culprit == ""


@given(st.floats(-TICK, 10.0))
def test_the_watcher_is_there_in_time(late):
    """However late the hub is at one look, at the next it is not later than ``BLOCKED`` by more than one look's pause."""
    pause = next_look(late)
    assert LOOK / 10 <= pause <= TICK + BLOCKED + LOOK
    assert late + pause <= max(late, BLOCKED) + LOOK


def test_a_celery_task_is_named_with_its_id():
    """The frame of Celery's tracer knows which task runs; without one the place has to do."""
    program = compile(
        "def trace_task(uuid, name):\n    return look()\n", "celery/app/trace.py", "exec"
    )
    scope = {"__name__": "celery.app.trace", "look": lambda: describe(sys._getframe())}
    exec(program, scope)
    assert scope["trace_task"]("id-1", "shop.pay").startswith("shop.pay[id-1] at ")
    assert describe(sys._getframe()).endswith("in test_a_celery_task_is_named_with_its_id")
    assert describe(None) == "the standard library"
