"""The workers of all queue engines with the published adapters on this package."""

import os
import signal
from dataclasses import dataclass

import pytest

from tests.support.adapter_hosts import AdapterProject
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(180)

HUEY = ("huey_consumer", "-w", "2")


@dataclass(frozen=True)
class Worker:
    """A worker of a queue engine.

    :param app: the module that installs the agent; ``command`` names it.
    :param command: console script and arguments.
    :param slots: number of concurrent tasks.
    :param agents: number of its processes with an agent.
    :param stop_signal: the signal for a warm shutdown.
    :param can_abort: whether it can terminate a running task.
    """

    engine: str
    title: str
    app: str
    command: tuple[str, ...]
    slots: int = 1
    agents: int = 1
    stop_signal: int = signal.SIGTERM
    can_abort: bool = True

    @property
    def row(self):
        return f"z4j-{self.engine}", self.title, self.engine

    def task_name(self, task):
        """Return a task's name; RQ uses the function's path."""
        return f"sample_tasks.{task}" if self.engine == "rq" else task


def celery_worker(pool, slots=2, **options):
    """Return a Celery worker with a pool."""
    command = f"celery -A celery_app worker -P {pool} -c {slots} -n w1@adapters".split()
    return Worker("celery", f"{pool} pool", "celery_app", command, slots=slots, **options)


WORKERS = [
    celery_worker("gevent"),
    celery_worker("eventlet"),
    celery_worker("threads", can_abort=False),
    celery_worker("solo", slots=1, can_abort=False),
    celery_worker("prefork"),
    Worker("rq", "Worker, forking", "rq_app", ("rq", "worker", "-c", "rq_app", "--name", "w1")),
    Worker(
        "rq",
        "SimpleWorker",
        "rq_app",
        ("rq", "worker", "-c", "rq_app", "--worker-class", "rq.SimpleWorker"),
    ),
    Worker(
        "dramatiq",
        "dramatiq, threads",
        "dramatiq_app",
        ("dramatiq", "dramatiq_app", "-p", "1", "-t", "2"),
        slots=2,
    ),
    Worker(
        "dramatiq",
        "dramatiq-gevent",
        "dramatiq_app",
        ("dramatiq-gevent", "dramatiq_app", "-p", "1", "-t", "2"),
        slots=2,
    ),
    Worker(
        "huey",
        "thread workers",
        "huey_app",
        (*HUEY, "huey_app.huey"),
        slots=2,
        stop_signal=signal.SIGINT,
    ),
    Worker(
        "huey",
        "greenlet workers",
        "huey_gevent_app",
        (*HUEY, "-k", "greenlet", "huey_gevent_app.huey"),
        slots=2,
        stop_signal=signal.SIGINT,
    ),
    Worker(
        "huey",
        "process workers, `post_fork()`",
        "huey_app",
        (*HUEY, "-k", "process", "huey_app.huey"),
        slots=2,
        agents=3,
        stop_signal=signal.SIGINT,
    ),
    Worker("arq", "arq", "arq_app", ("arq", "arq_app.WorkerSettings"), slots=10),
    Worker(
        "taskiq",
        "taskiq worker",
        "taskiq_app",
        ("taskiq", "worker", "-w", "1", "taskiq_app:broker"),
        slots=10,
    ),
]


def worker_params():
    """Yield the workers as test parameters; only SimpleWorker is fast enough for CI."""
    for each in WORKERS:
        marks = () if each.title == "SimpleWorker" else pytest.mark.long
        yield pytest.param(
            each, id=f"{each.engine}-{each.title.split()[0].strip(',')}", marks=marks
        )


@pytest.fixture(scope="module", params=worker_params())
def worker(request):
    return request.param


@pytest.fixture(scope="module")
def project(worker, brain, redis_url, tmp_path_factory):
    """A project with the running worker and a session of each agent."""
    with AdapterProject(
        brain, redis_url, tmp_path_factory.mktemp(worker.engine), worker.app, worker.engine
    ) as here:
        here.host = here.start(*worker.command, processes=worker.agents)
        if worker.title == "prefork pool":
            here.warm_up()
        yield here


def test_task_events_arrive(worker, project, prove):
    """A successful and a failed task have rows with name and state, and all their events."""
    good, bad = project.send(("add", 1, 2), ("fails", "broken"))
    ended, failed = project.row(good, "success"), project.row(bad, "failure")
    assert (ended["name"], failed["name"]) == (worker.task_name("add"), worker.task_name("fails"))
    kinds = project.kinds(good) | project.kinds(bad)
    assert {"task.started", "task.succeeded", "task.failed"} <= kinds
    if worker.engine != "arq":  # arq's adapter reports no error texts.
        assert "broken" in error(failed)
    prove(worker.row, "events", ", ".join(sorted(kind.removeprefix("task.") for kind in kinds)))


def test_submitted_task_runs_without_visible_loop(worker, project, prove):
    """A submitted task runs, and a concurrent task sees no running loop but its host's own."""
    project.send(("checks_loop", 2.0))
    row = project.submit(worker.task_name("add"), 30, 12)
    assert row["status"] == "completed", row["error"]
    until(
        lambda: [line for line in project.actions("add") if line["x"] == 30],
        "the submitted task",
        timeout=20,
    )
    project.row(row["result"]["task_id"], "success")
    project.assert_no_loop_seen()
    prove(worker.row, "loop visible to tasks", "never")
    prove(worker.row, "command", "`submit_task`")


def error(row):
    """Return the texts of a task's error; Celery's is only in the traceback."""
    return f"{row['exception']} {row['traceback']}"


def cancel_waiting(worker, project):
    """Cancel a task that waits for a free slot."""
    *busy, cancelled = project.send(*[("waits", 3.0)] * worker.slots, ("add", 40, 2))
    until(lambda: len(project.actions("waits")) >= worker.slots, "a busy worker", timeout=20)
    row = project.command("cancel-task", task_id=cancelled)
    assert row["status"] == "completed", row["error"]
    for task_id in busy:
        project.row(task_id, "success")
    project.row(*project.send(("add", 50, 0)), "success")
    assert {40, 50} & {line["x"] for line in project.actions("add")} == {50}


def cancel_running(worker, project):
    """Cancel a running task."""
    (cancelled,) = project.send(("waits", 60.0))
    until(lambda: project.actions("waits"), "the running task", timeout=20)
    row = project.command("cancel-task", task_id=cancelled)
    assert row["status"] == "completed", row["error"]
    project.row(cancelled, "failure" if worker.engine == "arq" else "revoked")
    assert not project.actions("waited")


def retry_with_arguments(worker, project):
    """Retry a task with other arguments."""
    (task_id,) = project.send(("fails", "once"))
    project.row(task_id, "failure")
    row = project.command(
        "retry-task", task_id=task_id, override_args=["twice"], override_kwargs={}
    )
    assert row["status"] == "completed", row["error"]
    until(
        lambda: any(
            "twice" in error(each) for each in project.brain.tasks(project.slug, state="failure")
        ),
        "the retried task",
        timeout=20,
    )


#: Commands of each engine in addition to ``submit_task``; taskiq has none.
CONTROLS = {
    "rq": {"cancel_task": cancel_waiting},
    "dramatiq": {"retry_task": retry_with_arguments},
    "huey": {"cancel_task": cancel_waiting},
    "arq": {"cancel_task": cancel_running},
    "celery": {"retry_task": retry_with_arguments, "cancel_task": cancel_running},
}


def test_controls_take_effect(worker, project, prove):
    """Retry and cancel commands, where the adapter supports them, change what the worker runs."""
    controls = {
        action: check
        for action, check in CONTROLS.get(worker.engine, {}).items()
        if worker.can_abort or check is not cancel_running
    }
    if not controls:
        pytest.skip("the adapter supports only submit_task")
    for check in controls.values():
        check(worker, project)
    prove(worker.row, "command", ", ".join(f"`{each}`" for each in ("submit_task", *controls)))


def test_warm_shutdown_loses_no_task(worker, project, prove):
    """A stopped worker exits with 0; its finished tasks are in the brain or in the buffer."""
    before = len(project.actions("add"))
    ids = project.send(*[("add", number, 1) for number in range(60)])
    until(lambda: len(project.actions("add")) > before + 15, "a few tasks", timeout=20)
    os.kill(project.host.pid, worker.stop_signal)
    until(lambda: not project.host.running, "the worker's end", timeout=30)
    assert project.host.exit_code == 0
    ran = len(project.actions("add")) - before
    until(
        lambda: project.count_succeeded(ids) + project.count_buffered() >= ran,
        f"the ends of {ran} tasks, in the brain or in the buffer",
        timeout=20,
    )
    prove(
        worker.row,
        "clean stop",
        f"{signal.Signals(worker.stop_signal).name}, exit code 0, nothing lost",
    )
