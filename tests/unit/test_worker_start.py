"""A Celery worker's agent: which worker gets one, when it starts, and processes that get none."""

import logging
import os
import sys

import pytest
import z4j_celery  # the bootstrap requires that the application imports it
from celery import signals
from celery.apps.worker import Worker
from celery.worker import WorkController

from tests.support.celery_fakes import memory_app
from tests.support.engines import FakeEngine
from tests.support.peer import SECRET_TEXT
from z4j_bare import AgentRuntime, RuntimeState, install, install_agent, process
from z4j_bare import _process_singleton as singleton
from z4j_bare.engines.celery.prefork import prefork
from z4j_bare.engines.celery.worker_start import CHANNEL_VARIABLE, WorkerStart

SIGNALS = ("worker_init", "worker_before_create_process", "worker_ready", "worker_shutdown")

GIVEN = {
    "brain_url": "http://127.0.0.1:9",
    "token": "tok",
    "project_id": "demo",
    "hmac_secret": SECRET_TEXT,
}

MODULE = ("/venv/lib/python3.11/site-packages/celery/__main__.py", "-A", "shop", "worker")
PROGRAM = ("/srv/shop/run.py", "--verbose")


class Consumer:
    """The Consumer of the worker."""

    hostname = "w1@host"
    pool = None

    def __init__(self, app):
        self.app = app


class WorkerProcess:
    """Sends the signals of a Celery worker in this process, and keeps the agents that are built."""

    def __init__(self, monkeypatch):
        self.app = memory_app()
        self.agents = []
        build = AgentRuntime._build

        def count(runtime):
            agent = build(runtime)
            self.agents += [] if agent is None else [agent]
            return agent

        monkeypatch.setattr(AgentRuntime, "_build", count)

    def init(self, kind=Worker, pool="solo"):
        worker = object.__new__(kind)
        worker.pool_cls = pool
        signals.worker_init.send(sender=worker)

    def ready(self):
        signals.worker_ready.send(sender=Consumer(self.app))

    def run(self):
        self.init()
        self.ready()

    def shutdown(self):
        signals.worker_shutdown.send(sender=None)

    @property
    def runtime(self):
        return singleton.current_runtime()


@pytest.fixture
def worker(monkeypatch):
    """A worker whose signals have only the handlers of a new ``WorkerStart``."""
    before = {name: list(getattr(signals, name).receivers) for name in SIGNALS}
    for name in SIGNALS:
        getattr(signals, name).receivers.clear()
    singleton.clear_runtime()
    for module, name, value in (
        (process, "_is_celery_worker", False),
        (process, "_consumer", None),
        (install, "_worker_start", WorkerStart(install._start, install._install_for_worker)),
    ):
        monkeypatch.setattr(module, name, value)
    install._worker_start.connect()
    made = WorkerProcess(monkeypatch)
    yield made
    if made.runtime is not None:
        made.runtime.stop(timeout=2)
    singleton.clear_runtime()
    prefork.close()
    for name, receivers in before.items():
        getattr(signals, name).receivers[:] = receivers
    made.app.close()


@pytest.fixture
def argv(monkeypatch):
    return lambda words: monkeypatch.setattr(sys, "argv", list(words))


@pytest.fixture
def configured(monkeypatch):
    """The variables from which the agent can be installed. The agent does not wait for acks."""
    monkeypatch.setenv("Z4J_FLUSH_SECONDS", "0")
    for name, value in GIVEN.items():
        monkeypatch.setenv(f"Z4J_{name.upper()}", value)


@pytest.mark.parametrize("words", [MODULE, PROGRAM])
@pytest.mark.usefixtures("configured")
def test_import_of_z4j_celery_starts_agent_in_every_worker(worker, argv, words):
    """The agent starts at worker_ready, whatever the command line, and stops with the worker."""
    argv(words)
    worker.init()
    assert worker.agents == []
    worker.ready()
    runtime = worker.runtime
    assert runtime.state is RuntimeState.RUNNING
    (engine,) = runtime.engines.values()
    assert isinstance(engine, z4j_celery.CeleryEngineAdapter)
    assert (engine.celery_app, engine.worker_hostname) == (worker.app, "w1@host")
    assert process.ready_worker().hostname == "w1@host"
    assert process.is_celery_worker()
    worker.shutdown()
    assert runtime.state is RuntimeState.STOPPED


@pytest.mark.usefixtures("configured")
def test_worker_has_agent_of_application_only(worker, argv):
    """An agent that the application installs is the only one, and knows the worker."""
    argv(MODULE)
    engine = FakeEngine("retry_task")
    engine.worker_hostname = None
    runtime = install_agent(engines=[engine])
    worker.run()
    assert worker.runtime is runtime
    assert runtime.state is RuntimeState.RUNNING
    assert engine.worker_hostname == "w1@host"
    assert len(worker.agents) == 1
    worker.shutdown()
    assert runtime.state is RuntimeState.STOPPED


@pytest.mark.usefixtures("configured")
def test_agent_that_precedes_worker_is_started_again(worker, argv):
    """An agent that started before app.worker_main() stops at worker_init and starts when ready."""
    argv(PROGRAM)
    runtime = install_agent(engines=[FakeEngine("retry_task")])
    assert runtime.state is RuntimeState.RUNNING
    worker.init()
    assert runtime.state is RuntimeState.STOPPED
    worker.ready()
    assert runtime.state is RuntimeState.RUNNING
    assert len(worker.agents) == 2


@pytest.mark.usefixtures("configured")
def test_stopped_agent_is_not_started_beside_its_successor(worker, argv):
    """If another agent is installed between worker_init and worker_ready, only that one runs."""
    argv(PROGRAM)
    first = install_agent(engines=[FakeEngine("retry_task")])
    worker.init()
    second = install_agent(engines=[FakeEngine("retry_task")])
    assert second is not first
    worker.ready()
    assert (first.state, second.state) == (RuntimeState.STOPPED, RuntimeState.RUNNING)


def test_worker_without_settings_logs_one_line(worker, argv, caplog):
    """Without any variable, a worker that only imports z4j_celery logs one line of level INFO."""
    argv(MODULE)
    caplog.set_level(logging.INFO)
    worker.run()
    assert worker.runtime is None
    (line,) = [record for record in caplog.records if "no agent in this worker" in record.message]
    assert line.levelname == "INFO"
    assert "Z4J_BRAIN_URL" in line.message


@pytest.mark.parametrize(
    ("name", "value"), [("Z4J_HMAC_SECRET", "c2hvcnQ="), ("Z4J_BRAIN_URL", "nonsense")]
)
@pytest.mark.usefixtures("configured")
def test_worker_with_wrong_setting_logs_warning(worker, argv, caplog, monkeypatch, name, value):
    """A wrong variable costs the agent, not the worker; the warning names the variable."""
    argv(MODULE)
    monkeypatch.setenv(name, value)
    worker.run()
    assert worker.runtime is None
    (line,) = [record for record in caplog.records if "no agent in this worker" in record.message]
    assert line.levelname == "WARNING"
    assert name in line.message


@pytest.mark.parametrize("name", ["Z4J_DISABLED", "Z4J_TESTING"])
@pytest.mark.usefixtures("configured")
def test_disabled_worker_gets_no_agent(worker, argv, monkeypatch, name):
    """With Z4J_DISABLED or Z4J_TESTING a worker gets no agent."""
    argv(MODULE)
    monkeypatch.setenv(name, "1")
    worker.run()
    assert worker.agents == []


@pytest.mark.usefixtures("configured")
def test_worker_without_z4j_celery_gets_no_agent(worker, argv, monkeypatch):
    """Importing only z4j_bare installs nothing."""
    argv(MODULE)
    monkeypatch.delitem(sys.modules, "z4j_celery")
    worker.run()
    assert (worker.runtime, worker.agents) == (None, [])


@pytest.mark.usefixtures("configured")
def test_worker_inside_a_test_changes_nothing(worker, argv):
    """A worker that a program runs for its tests, as Celery's fixtures do, gets no agent, and
    leaves the program's own agent alone.
    """
    argv(PROGRAM)
    worker.init(WorkController)
    assert not process.is_celery_worker()
    runtime = install_agent(engines=[FakeEngine("retry_task")])
    worker.init(WorkController)
    assert runtime.state is RuntimeState.RUNNING
    assert len(worker.agents) == 1


@pytest.mark.parametrize(("pool", "opened"), [("prefork", True), ("solo", False)])
def test_channel_is_open_after_worker_init(worker, pool, opened):
    """A prefork worker has its channel before its first child is forked; other pools have none."""
    worker.init(pool=pool)
    assert (prefork.channel is not None) is opened


@pytest.mark.usefixtures("configured")
def test_spawned_child_starts_no_agent(worker, argv, monkeypatch):
    """A child that imports the program again does not start an agent beside its parent's."""
    argv(PROGRAM)
    monkeypatch.setenv(CHANNEL_VARIABLE, f"/nowhere/channel-{os.getppid()}")
    runtime = install_agent(engines=[FakeEngine("retry_task")])
    assert runtime.state is RuntimeState.STOPPED
    assert worker.agents == []
