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


def test_the_first_has_the_process(caplog):
    """The first to register keeps the process; a later one is told who has it."""
    caplog.set_level(logging.INFO)
    first, second = object(), object()
    assert singleton.try_register(first, owner="django") is first
    assert singleton.try_register(second, owner="celery") is first
    assert singleton.try_register(first, owner="again") is first
    assert singleton.current_runtime() is first
    assert "celery asked for an agent, but django has installed one" in caplog.text


def test_a_retired_one_gives_way():
    """A runtime that was stopped is no claim on the process, one that has not started yet is."""
    waiting, has_stopped, new = SimpleNamespace(has_stopped=False), SimpleNamespace(has_stopped=True), object()
    singleton.try_register(waiting, owner="a")
    assert singleton.try_register(new, owner="b") is waiting
    singleton.clear_runtime()
    singleton.try_register(has_stopped, owner="a")
    assert singleton.try_register(new, owner="b") is new
    assert singleton.current_owner() == "b"


def test_clearing():
    """The slot is freed for its holder or for anybody, and says whether it was."""
    first = object()
    assert singleton.clear_runtime() is False
    singleton.try_register(first, owner="a")
    assert singleton.clear_runtime(expected=object()) is False
    assert singleton.clear_runtime(expected=first) is True
    assert (singleton.current_runtime(), singleton.current_owner()) == (None, None)


def test_racing_for_the_slot(backend):
    """Of many that register at once exactly one gets the process, and all are told the same."""
    winners = []
    tasks = [
        backend.spawn(lambda: winners.append(singleton.try_register(object(), owner="x")), name="r")
        for _ in range(20)
    ]
    assert all(task.join(10) for task in tasks)
    assert len(winners) == 20
    assert len(set(map(id, winners))) == 1


def test_post_fork(caplog):
    """post_fork() restarts the runtime that has the process, and a failure of that is logged, not raised."""
    assert post_fork() is None
    calls = []
    runtime = SimpleNamespace(has_stopped=False, reinit_after_fork=lambda: calls.append(1))
    singleton.try_register(runtime, owner="a")
    assert post_fork() is runtime
    assert calls == [1]
    runtime.reinit_after_fork = lambda: 1 / 0
    assert post_fork() is runtime
    assert "could not be restarted after fork" in caplog.text
