"""RQ's workers, heard through stand-ins for RQ and its adapter; ``tests/adapters`` has the real ones."""

import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from z4j_bare.engines.engine import describe_engine
from z4j_bare.engines.rq import RqSource
from z4j_bare.events.ring import Ring
from z4j_bare.settings import Settings


class StopRequested(Exception):  # noqa: N818 - RQ's name
    """As in RQ: an ordinary exception."""


StopRequested.__module__ = "rq.exceptions"


class InvalidJobOperation(Exception):  # noqa: N818 - RQ's name
    """What RQ raises for a job that is gone."""


class BaseWorker:
    """As in RQ: asked to stop it makes a note while busy, and raises at any other moment."""

    name = "w1"
    busy = stop_event = False

    def request_stop(self, _number, _frame):
        if not self.busy:
            raise StopRequested
        self.stop_event = True

    def perform_job(self, job, queue, execution):
        if job.raises:
            raise job.raises
        job.carried_out = queue, execution
        return True

    def run(self, job):
        """Go on until asked to stop; return whether that request has arrived."""
        try:
            self.execute_job(job, "q")
        except StopRequested:
            return True
        return self.stop_event

    def execute_job(self, job, queue):
        self.busy = True
        self.work(job, queue)
        self.busy = False
        job.strike("idle")


class Worker(BaseWorker):
    """Watches a child at work, which writes to Redis how the job ended."""

    def work(self, job, queue):
        self.monitor_work_horse(job, queue, "e")

    def monitor_work_horse(self, job, queue, execution):
        self.perform_job(job, queue, execution)


class SimpleWorker(BaseWorker):
    """Carries the job out itself."""

    def work(self, job, queue):
        self.perform_job(job, queue, "e")


class Job:
    """A job that ends with ``status``, in Redis and in the worker's memory; at ``moment`` a SIGTERM strikes."""

    def __init__(self, status="finished", raises=None, moment=None):
        self.worker_name = self.carried_out = None
        self.status, self.raises, self.moment = status, raises, moment

    def strike(self, moment):
        if moment == self.moment:
            signal.raise_signal(signal.SIGTERM)

    def get_status(self, refresh=True):
        self.strike("reading")
        if isinstance(self.status, Exception):
            raise self.status
        return self.status


@pytest.fixture
def heard(monkeypatch):
    """What the adapter was told of, as pairs of a kind and the worker of the job; like the adapter it eats exceptions."""
    told = []

    def teller(kind):
        def tell(job):
            try:
                job.strike(kind)
                told.append((kind, job.worker_name))
            except Exception as error:
                told.append((repr(error), None))

        return tell

    names = (
        "rq",
        "rq.worker",
        "rq.exceptions",
        "z4j_rq",
        "z4j_rq.events",
        "z4j_rq.events.callbacks",
    )
    modules = {name: ModuleType(name) for name in names}
    modules["rq.worker"].Worker, modules["rq.worker"].SimpleWorker = Worker, SimpleWorker
    modules["rq.exceptions"].InvalidJobOperation = InvalidJobOperation
    events, callbacks = modules["z4j_rq.events"], modules["z4j_rq.events.callbacks"]
    events.callbacks = callbacks
    callbacks.install = lambda **sink: vars(callbacks).update(sink)
    callbacks.uninstall = lambda: vars(callbacks).update(sink=None)
    for kind in ("started", "success", "failure"):
        setattr(events, f"capture_{kind}", teller(kind))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return told


@pytest.fixture
def source(heard, backend):
    engine = SimpleNamespace(name="rq", rq_app=object(), redaction=object())
    made = describe_engine(engine).make_source(
        Ring(10, 10, backend.event()), Settings(), backend, None
    )
    assert isinstance(made, RqSource)
    assert not made.uses_adapter_events
    made.connect()
    yield made
    made.disconnect()


@pytest.fixture
def worker(source, request):
    """A worker of the class that the test asks for, which has SIGTERM in its hands."""
    made = request.param()
    before = signal.signal(signal.SIGTERM, made.request_stop)
    yield made
    signal.signal(signal.SIGTERM, before)


both = pytest.mark.parametrize("worker", [Worker, SimpleWorker], indirect=True)


@both
@pytest.mark.parametrize(
    ("status", "kinds"),
    [
        ("finished", ["started", "success"]),
        ("failed", ["started", "failure"]),
        ("stopped", ["started", "failure"]),
        ("scheduled", ["started"]),
    ],
)
def test_start_and_outcome_are_told(worker, heard, status, kinds):
    """The adapter hears of the start, with the worker's name, and of the end that RQ has written down; the job is done once."""
    job = Job(status)
    assert not worker.run(job)
    assert (job.carried_out, heard) == (("q", "e"), [(kind, "w1") for kind in kinds])


@both
@pytest.mark.parametrize("moment", ["started", "reading", "success", "idle"])
def test_a_stop_at_any_moment_loses_nothing(worker, heard, moment):
    """A SIGTERM amid what is told, or as soon as RQ is idle, reaches RQ, and the job is told as it was."""
    assert worker.run(Job(moment=moment))
    assert [kind for kind, _ in heard] == ["started", "success"]


@both
def test_an_error_of_rq_passes(worker, heard):
    """What a worker raises is told as a failure and raised on."""
    with pytest.raises(ConnectionError):
        worker.run(Job(raises=ConnectionError()))
    assert [kind for kind, _ in heard] == ["started", "failure"]


@both
def test_an_outcome_that_cannot_be_read_costs_the_job_nothing(worker, heard):
    """When Redis does not answer after the job, the job's own result stands."""
    assert not worker.run(Job(ConnectionError()))
    assert [kind for kind, _ in heard] == ["started"]


@pytest.mark.parametrize(
    ("worker", "status"),
    [(Worker, InvalidJobOperation()), (Worker, None), (SimpleWorker, "started")],
    indirect=["worker"],
)
def test_a_job_without_a_result_has_ended_well(worker, heard, status):
    """A job whose result RQ does not keep (``result_ttl=0``) is gone from Redis, or has no last status: it went well."""
    worker.run(Job(status))
    assert [kind for kind, _ in heard] == ["started", "success"]


def test_events_of_callbacks_reach_the_ring_of_their_process(source, heard):
    """What the adapter's callbacks make is recorded, in a forked work horse it is not; after ``disconnect`` nobody takes it."""
    callbacks = sys.modules["z4j_rq.events.callbacks"]
    taken = []
    source.record = taken.append
    callbacks.sink("event")
    child = os.fork()
    if not child:
        callbacks.sink("event of the child")
        os._exit(len(taken))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert taken == ["event"]
    source.disconnect()
    assert callbacks.sink is None


def test_the_hooks_come_off(heard, source):
    """After ``disconnect`` RQ's classes are as before."""
    hooked = Worker.monitor_work_horse
    source.disconnect()
    assert Worker.monitor_work_horse is hooked.__wrapped__
    assert "perform_job" not in vars(SimpleWorker)


def test_a_hook_that_is_wrapped_stays(heard, source):
    """What somebody else has put around a hook meanwhile is not lost by ``disconnect``."""
    theirs = SimpleWorker.perform_job = object()
    try:
        source.disconnect()
        assert SimpleWorker.perform_job is theirs
    finally:
        del SimpleWorker.perform_job


def test_without_rq_there_is_nothing_to_hook(heard, source, monkeypatch):
    """A process without RQ's workers has the engine all the same."""
    source.disconnect()
    monkeypatch.setitem(sys.modules, "rq.worker", None)
    source.connect()
    source.disconnect()
