"""RQ's SimpleWorker, heard through a stand-in for the adapter; ``tests/adapters`` has the real ones."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from z4j_bare.capture.ring import Ring
from z4j_bare.capture.rq import RqSource
from z4j_bare.capture.sources import source_of
from z4j_bare.settings import Settings


class SimpleWorker:
    """As in RQ: it carries the job out in its own process, and writes down how it ended."""

    name = "w1"

    def execute_job(self, job, queue):
        if job.raises:
            raise job.raises
        job.carried_out = queue
        return "returned"


@pytest.fixture
def heard(monkeypatch):
    """What the adapter was told of, as pairs of a kind and the worker of the job."""
    told = []

    def teller(kind):
        return lambda job: told.append((kind, job.worker_name))

    modules = {name: ModuleType(name) for name in ("rq", "rq.worker", "z4j_rq", "z4j_rq.events")}
    monkeypatch.setattr(SimpleWorker.execute_job, "__module__", "rq.worker")
    modules["rq.worker"].SimpleWorker = SimpleWorker
    for kind in ("started", "success", "failure"):
        setattr(modules["z4j_rq.events"], f"capture_{kind}", teller(kind))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.fixture
def source(heard, seam):
    made = source_of(SimpleNamespace(name="rq", rq_app=object()), Ring(10, 10, seam.event()), Settings(), seam, None)
    assert isinstance(made, RqSource)
    made.connect()
    yield made
    made.disconnect()


def job(status="finished", raises=None):
    return SimpleNamespace(worker_name=None, raises=raises, carried_out=None, get_status=lambda: status)


@pytest.mark.parametrize(
    ("status", "kinds"),
    [
        ("finished", ["started", "success"]),
        ("failed", ["started", "failure"]),
        ("stopped", ["started", "failure"]),
        ("scheduled", ["started"]),
    ],
)
def test_start_and_outcome_are_told(source, heard, status, kinds):
    """The adapter hears of the start, with the worker's name, and of the end that RQ has written down; RQ gets its result."""
    one = job(status)
    assert SimpleWorker().execute_job(one, "q") == "returned"
    assert (one.carried_out, heard) == ("q", [(kind, "w1") for kind in kinds])


def test_an_error_of_rq_passes(source, heard):
    """What ``execute_job`` raises is told as a failure and raised on."""
    with pytest.raises(ConnectionError):
        SimpleWorker().execute_job(job(raises=ConnectionError()), "q")
    assert [kind for kind, _ in heard] == ["started", "failure"]


def test_an_outcome_that_cannot_be_read_costs_the_job_nothing(source, heard):
    """When Redis does not answer after the job, the job's own result stands."""
    one = job()
    one.get_status = lambda: 1 // 0
    assert SimpleWorker().execute_job(one, "q") == "returned"
    assert [kind for kind, _ in heard] == ["started"]


def test_the_hook_comes_off(heard, source):
    """After ``disconnect`` the class is as before; of a class that somebody else has hooked, nothing is touched."""
    hook = SimpleWorker.execute_job
    source.disconnect()
    assert SimpleWorker.execute_job is not hook
    SimpleWorker().execute_job(job(), "q")
    SimpleWorker.execute_job.__module__ = "some_apm"
    theirs = SimpleWorker.execute_job
    source.connect()
    assert (SimpleWorker.execute_job, heard) == (theirs, [])


def test_without_rq_there_is_nothing_to_hook(heard, source, monkeypatch):
    """A process without RQ's workers has the engine all the same."""
    source.disconnect()
    monkeypatch.setitem(sys.modules, "rq.worker", None)
    source.connect()
    source.disconnect()
