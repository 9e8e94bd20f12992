"""One runtime per process."""

import logging
from types import SimpleNamespace

import pytest

from z4j_bare import _process_singleton as singleton
from z4j_bare import post_fork


@pytest.fixture(autouse=True)
def empty_slot():
    singleton.clear_runtime()
    yield
    singleton.clear_runtime()


def test_first_runtime_stays_registered(caplog):
    """The first runtime stays registered, and the log names the owners of both."""
    caplog.set_level(logging.INFO)
    first, second = object(), object()
    assert singleton.try_register(first, owner="django") is first
    assert singleton.try_register(second, owner="celery") is first
    assert singleton.try_register(first, owner="again") is first
    assert singleton.current_runtime() is first
    assert "celery requested an agent, but django already installed one" in caplog.text


def test_stopped_runtime_is_replaced():
    """A stopped runtime is replaced by the next one; a runtime that has not started is kept."""
    unstarted, stopped = SimpleNamespace(has_stopped=False), SimpleNamespace(has_stopped=True)
    new = object()
    singleton.try_register(unstarted, owner="a")
    assert singleton.try_register(new, owner="b") is unstarted
    singleton.clear_runtime()
    singleton.try_register(stopped, owner="a")
    assert singleton.try_register(new, owner="b") is new
    assert singleton.current_owner() == "b"


def test_clear_removes_expected_runtime_only():
    """clear_runtime removes the expected runtime or any one, and reports whether it did."""
    first = object()
    assert singleton.clear_runtime() is False
    singleton.try_register(first, owner="a")
    assert singleton.clear_runtime(expected=object()) is False
    assert singleton.clear_runtime(expected=first) is True
    assert (singleton.current_runtime(), singleton.current_owner()) == (None, None)


def test_concurrent_registrations_return_one_runtime(backend):
    """Of many concurrent registrations one wins, and all callers get the same runtime."""
    winners = []
    tasks = [
        backend.spawn(lambda: winners.append(singleton.try_register(object(), owner="x")), name="r")
        for _ in range(20)
    ]
    assert all(task.join(10) for task in tasks)
    assert len(winners) == 20
    assert len(set(map(id, winners))) == 1


def test_post_fork_restarts_registered_runtime(caplog):
    """post_fork() restarts the registered runtime; a failure is logged, not raised."""
    assert post_fork() is None
    calls = []
    runtime = SimpleNamespace(has_stopped=False, reinit_after_fork=lambda: calls.append(1))
    singleton.try_register(runtime, owner="a")
    assert post_fork() is runtime
    assert calls == [1]
    runtime.reinit_after_fork = lambda: 1 / 0
    assert post_fork() is runtime
    assert "could not restart the agent after a fork" in caplog.text
