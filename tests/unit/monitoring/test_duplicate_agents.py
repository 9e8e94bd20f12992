"""Two agents that report one worker are told of, once, and nobody else is."""

import pytest

from tests.unit.monitoring.test_control_server import serve  # noqa: F401 - a fixture
from z4j_bare.control import STATUS
from z4j_bare.monitoring import duplicate_agents as rivals
from z4j_bare.monitoring.duplicate_agents import DuplicateAgentCheck


def told(project="p", started_at="now", workers=("celery@a",)):
    """What an agent says of itself."""
    return {"project": project, "started_at": started_at, "workers": {"celery": list(workers)}}


@pytest.fixture
def look(backend, until, monkeypatch):
    """``look()``: run the loop through both its looks and end it."""
    monkeypatch.setattr(rivals, "LOOKS", (0.01, 0.01))

    def through(own):
        stop_event, looks = backend.event(), []
        loop = DuplicateAgentCheck(lambda: looks.append(1) or own, backend)
        task = backend.spawn(loop.run, stop_event, name="rivals")
        until(lambda: len(looks) == 2)
        stop_event.set()
        assert task.join(10)

    return through


def test_a_rival_is_named_once(serve, look, caplog):  # noqa: F811
    """An agent that reports our worker is named with its process, at the first look only."""
    serve("django", **{STATUS: told(started_at="before", workers=("celery@a", "celery@b"))})
    look(told())
    (warning,) = caplog.records
    assert "reports celery@a too" in warning.getMessage()


@pytest.mark.parametrize(
    "other",
    [
        told(started_at="before", project="q"),
        told(started_at="before", workers=("celery@b",)),
        told(),
        {"error": "?"},
    ],
)
def test_others_are_not(serve, look, caplog, other):  # noqa: F811
    """Another project, other workers, ourselves, and one that says nothing useful are no rivals."""
    serve("bare", **{STATUS: other})
    look(told())
    assert caplog.records == []


def test_a_rival_that_hangs(serve, look, monkeypatch, caplog):  # noqa: F811
    """One that does not answer costs its short time, and no more."""
    serve("bare")
    look(told())
    assert caplog.records == []
