"""The RQ source with fakes of RQ and its adapter; ``tests/adapters`` uses the real ones."""

import os
import signal
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest

from z4j_bare.engines.engine import describe_engine
from z4j_bare.engines.rq import RqSource
from z4j_bare.events.ring import Ring
from z4j_bare.settings import Settings


class StopRequested(Exception):  # noqa: N818 - RQ's name
    """An ordinary exception, as in RQ."""


StopRequested.__module__ = "rq.exceptions"


class InvalidJobOperation(Exception):  # noqa: N818 - RQ's name
    """Raised by RQ for a job that is no longer in Redis."""


class BaseWorker:
    """Handles a stop request as RQ does: sets a flag while busy, else raises."""

    name = "w1"
    busy = stop_requested = False

    def request_stop(self, _number, _frame):
        if not self.busy:
            raise StopRequested
        self.stop_requested = True

    def perform_job(self, job, queue, execution):
        if job.raises:
            raise job.raises
        job.performed = queue, execution
        return True

    def run(self, job):
        """Run one job; return whether a stop request arrived."""
        try:
            self.execute_job(job, "q")
        except StopRequested:
            return True
        return self.stop_requested

    def execute_job(self, job, queue):
        self.busy = True
        self.work(job, queue)
        self.busy = False
        job.signal_at("idle")


class Worker(BaseWorker):
    """Watches the child process that runs the job and writes its status to Redis."""

    def work(self, job, queue):
        self.monitor_work_horse(job, queue, "e")

    def monitor_work_horse(self, job, queue, execution):
        self.perform_job(job, queue, execution)


class SimpleWorker(BaseWorker):
    """Runs the job in its own process."""

    def work(self, job, queue):
        self.perform_job(job, queue, "e")


class Job:
    """A job that ends with ``status``; it sends SIGTERM at ``moment``."""

    def __init__(self, status="finished", raises=None, moment=None):
        self.worker_name = self.performed = None
        self.status, self.raises, self.moment = status, raises, moment

    def signal_at(self, moment):
        if moment == self.moment:
            signal.raise_signal(signal.SIGTERM)

    def get_status(self, refresh=True):
        self.signal_at("reading")
        if isinstance(self.status, Exception):
            raise self.status
        return self.status


@pytest.fixture
def reported(monkeypatch):
    """The reports to the adapter: pairs of kind and worker name.

    Like the adapter, the fake swallows exceptions.
    """
    reports = []

    def make_report(kind):
        def report(job):
            try:
                job.signal_at(kind)
                reports.append((kind, job.worker_name))
            except Exception as error:
                reports.append((repr(error), None))

        return report

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
        setattr(events, f"capture_{kind}", make_report(kind))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return reports


@pytest.fixture
def source(reported, backend):
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
    """A worker of the test's class, whose handler is installed for SIGTERM."""
    made = request.param()
    before = signal.signal(signal.SIGTERM, made.request_stop)
    yield made
    signal.signal(signal.SIGTERM, before)


both_workers = pytest.mark.parametrize("worker", [Worker, SimpleWorker], indirect=True)


@both_workers
@pytest.mark.parametrize(
    ("status", "kinds"),
    [
        ("finished", ["started", "success"]),
        ("failed", ["started", "failure"]),
        ("stopped", ["started", "failure"]),
        ("scheduled", ["started"]),
    ],
)
def test_start_and_outcome_are_reported(worker, reported, status, kinds):
    """Start and outcome are reported with the worker's name, and the job runs once."""
    job = Job(status)
    assert not worker.run(job)
    assert (job.performed, reported) == (("q", "e"), [(kind, "w1") for kind in kinds])


@both_workers
@pytest.mark.parametrize("moment", ["started", "reading", "success", "idle"])
def test_stop_request_at_any_moment_reaches_rq(worker, reported, moment):
    """A SIGTERM during a report, or when RQ is idle, reaches RQ; the job is reported correctly."""
    assert worker.run(Job(moment=moment))
    assert [kind for kind, _ in reported] == ["started", "success"]


@both_workers
def test_error_of_worker_is_reported_and_raised(worker, reported):
    """An exception of the worker is reported as a failure and raised."""
    with pytest.raises(ConnectionError):
        worker.run(Job(raises=ConnectionError()))
    assert [kind for kind, _ in reported] == ["started", "failure"]


@both_workers
def test_unreadable_outcome_does_not_fail_the_job(worker, reported):
    """When Redis cannot be read after the job, the job still succeeds."""
    assert not worker.run(Job(ConnectionError()))
    assert [kind for kind, _ in reported] == ["started"]


@pytest.mark.parametrize(
    ("worker", "status"),
    [(Worker, InvalidJobOperation()), (Worker, None), (SimpleWorker, "started")],
    indirect=["worker"],
)
def test_job_without_stored_result_is_successful(worker, reported, status):
    """A job whose result RQ does not keep (``result_ttl=0``) is reported as successful."""
    worker.run(Job(status))
    assert [kind for kind, _ in reported] == ["started", "success"]


def test_callback_events_are_recorded_in_parent_only(source, reported):
    """Events of the callbacks are recorded, but not in a forked work horse or once disconnected."""
    callbacks = sys.modules["z4j_rq.events.callbacks"]
    recorded = []
    source.record = recorded.append
    callbacks.sink("event")
    child = os.fork()
    if not child:
        callbacks.sink("event of the child")
        os._exit(len(recorded))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert recorded == ["event"]
    source.disconnect()
    assert callbacks.sink is None


def test_disconnect_removes_hooks(reported, source):
    """After ``disconnect`` RQ's classes have their original methods."""
    hooked = Worker.monitor_work_horse
    source.disconnect()
    assert Worker.monitor_work_horse is hooked.__wrapped__
    assert "perform_job" not in vars(SimpleWorker)


def test_disconnect_keeps_hooks_wrapped_by_others(reported, source):
    """``disconnect`` does not remove another library's wrapper around a hook."""
    wrapper = SimpleWorker.perform_job = object()
    try:
        source.disconnect()
        assert SimpleWorker.perform_job is wrapper
    finally:
        del SimpleWorker.perform_job


def test_source_works_without_rq(reported, source, monkeypatch):
    """A process without RQ can connect and disconnect the source."""
    source.disconnect()
    monkeypatch.setitem(sys.modules, "rq.worker", None)
    source.connect()
    source.disconnect()


class Adapter:
    """An adapter of the package z4j_rq; only its module and signatures matter."""

    rq_app = None
    __module__ = "z4j_rq.engine"

    def retry_task(self, task_id, *, eta=None):
        raise AssertionError(task_id)


class Subclass(Adapter):
    """An application's own adapter."""


class NewSignature(Adapter):
    def retry_task(self, task_id, *, task_name=None):
        raise AssertionError(task_id, task_name)


@pytest.mark.parametrize(
    ("number", "safe"),
    [
        ("1.0.0", False),
        ("1.6.0", False),
        ("1.6.6", False),
        ("1.6.post9", False),
        ("1.6.dev20261129", False),
        ("0.0.0+unknown", False),
        ("unknown", False),
        ("1.6.7", True),
        ("1.6.10", True),
        ("1.13.0+local.1", True),
        ("2.0", True),
    ],
)
def test_old_adapter_cannot_retry(monkeypatch, number, safe):
    """Retries are unsafe before z4j-rq 1.6.7, by the version of the distribution."""
    asked = []
    monkeypatch.setattr(
        "z4j_bare.engines.engine.version", lambda name: asked.append(name) or number
    )
    for adapter in (Adapter(), Subclass()):
        problem = describe_engine(adapter).retry_problem()
        assert (not problem) is safe
        assert safe or problem.startswith(f"z4j-rq {number} unpickles")
    assert set(asked) == {"z4j-rq"}


def test_adapter_without_distribution_is_judged_by_signature(monkeypatch):
    """Without a version, an adapter is safe if its method takes the task's name."""

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("z4j_bare.engines.engine.version", missing)
    assert "upgrade z4j-rq" in describe_engine(Adapter()).retry_problem()
    assert describe_engine(NewSignature()).retry_problem() == ""
    assert describe_engine(SimpleNamespace(rq_app=None)).retry_problem() == ""
