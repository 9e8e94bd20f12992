"""Warnings about two agents that report the same worker."""

import pytest

from z4j_bare.control import STATUS
from z4j_bare.monitoring import duplicate_agents
from z4j_bare.monitoring.duplicate_agents import DuplicateAgentCheck


def status(project="p", started_at="now", workers=("celery@a",)):
    """Return the status of an agent."""
    return {"project": project, "started_at": started_at, "workers": {"celery": list(workers)}}


@pytest.fixture
def check(backend, until, monkeypatch):
    """``check(own)``: run both checks of an agent with the status ``own``."""
    monkeypatch.setattr(duplicate_agents, "CHECK_DELAYS", (0.01, 0.01))

    def run(own):
        stop_event, checks = backend.event(), []
        loop = DuplicateAgentCheck(lambda: checks.append(1) or own, backend)
        task = backend.spawn(loop.run, stop_event, name="duplicates")
        until(lambda: len(checks) == 2)
        stop_event.set()
        assert task.join(10)

    return run


def test_check_warns_once_of_shared_worker(serve, check, caplog):
    """The first check names the other process and the shared worker; the second is silent."""
    serve("django", **{STATUS: status(started_at="before", workers=("celery@a", "celery@b"))})
    check(status())
    (warning,) = caplog.records
    assert "also reports worker celery@a" in warning.getMessage()


@pytest.mark.parametrize(
    "other",
    [
        status(started_at="before", project="q"),
        status(started_at="before", workers=("celery@b",)),
        status(),
        {"error": "?"},
    ],
)
def test_check_accepts_agent_without_shared_worker(serve, check, caplog, other):
    """No warning for another project, for other workers, for this agent, or for an error."""
    serve("bare", **{STATUS: other})
    check(status())
    assert caplog.records == []


def test_check_skips_agent_that_does_not_answer(serve, check, monkeypatch, caplog):
    """An agent that does not answer in time is left out without a warning."""
    serve("bare")
    check(status())
    assert caplog.records == []
