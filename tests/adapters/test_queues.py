"""Celery, rq, dramatiq, huey, arq and taskiq: their workers with the published adapters, unmodified, on this package."""

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
    """A worker of one queue.

    :param command: console script and words; the agent comes in with ``app``, the module that the words name.
    :param slots: how many tasks it runs at a time.
    :param agents: how many of its processes have an agent.
    :param stop_signal: the signal that asks it to finish what it does and leave.
    :param can_abort: whether it can end a task that runs.
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
        """Return a task's name: RQ has no other than the function's path."""
        return f"sample_tasks.{task}" if self.engine == "rq" else task


def celery(pool, slots=2, **how):
    """Return Celery's worker with one of its pools."""
    words = (
        "celery",
        "-A",
        "celery_app",
        "worker",
        "-P",
        pool,
        "-c",
        str(slots),
        "-n",
        "w1@adapters",
    )
    return Worker("celery", f"{pool} pool", "celery_app", words, slots=slots, **how)


WORKERS = [
    celery("gevent"),
    celery("eventlet"),
    celery("threads", can_abort=False),
    celery("solo", slots=1, can_abort=False),
    celery("prefork"),
    Worker("rq", "Worker, forking", "rq_app", ("rq", "worker", "-c", "rq_app", "--name", "w1")),
    Worker("rq", "SimpleWorker", "rq_app", ("rq", "worker", "-c", "rq_app", "--worker-class", "rq.SimpleWorker")),
    Worker("dramatiq", "dramatiq, threads", "dramatiq_app", ("dramatiq", "dramatiq_app", "-p", "1", "-t", "2"), slots=2),
    Worker("dramatiq", "dramatiq-gevent", "dramatiq_app", ("dramatiq-gevent", "dramatiq_app", "-p", "1", "-t", "2"), slots=2),
    Worker("huey", "thread workers", "huey_app", (*HUEY, "huey_app.huey"), slots=2, stop_signal=signal.SIGINT),
    Worker(
        "huey", "greenlet workers", "huey_gevent_app", (*HUEY, "-k", "greenlet", "huey_gevent_app.huey"),
        slots=2, stop_signal=signal.SIGINT,
    ),
    Worker(
        "huey", "process workers, `post_fork()`", "huey_app", (*HUEY, "-k", "process", "huey_app.huey"),
        slots=2, agents=3, stop_signal=signal.SIGINT,
    ),
    Worker("arq", "arq", "arq_app", ("arq", "arq_app.WorkerSettings"), slots=10),
    Worker("taskiq", "taskiq worker", "taskiq_app", ("taskiq", "worker", "-w", "1", "taskiq_app:broker"), slots=10),
]  # fmt: skip


def rows():
    """One of them is quick and needs little: it is part of CI."""
    for each in WORKERS:
        marks = () if each.title == "SimpleWorker" else pytest.mark.long
        yield pytest.param(
            each, id=f"{each.engine}-{each.title.split()[0].strip(',')}", marks=marks
        )


@pytest.fixture(scope="module", params=rows())
def worker(request):
    return request.param


@pytest.fixture(scope="module")
def project(worker, brain, redis_url, tmp_path_factory):
    """The worker, running, with a session of every agent in it."""
    with AdapterProject(
        brain, redis_url, tmp_path_factory.mktemp(worker.engine), worker.app, worker.engine
    ) as here:
        here.host = here.start(*worker.command, processes=worker.agents)
        if worker.title == "prefork pool":
            here.warm_up()
        yield here


def test_events_reach_the_brain(worker, project, prove):
    """A task that ends well and one that fails have rows with name and state, and their lives as events."""
    good, bad = project.send(("add", 1, 2), ("fails", "broken"))
    ended, failed = project.row(good, "success"), project.row(bad, "failure")
    assert (ended["name"], failed["name"]) == (worker.task_name("add"), worker.task_name("fails"))
    kinds = project.kinds(good) | project.kinds(bad)
    assert {"task.started", "task.succeeded", "task.failed"} <= kinds
    if worker.engine != "arq":  # whose adapter says nothing of errors
        assert "broken" in error(failed)
    prove(worker.row, "events", ", ".join(sorted(kind.removeprefix("task.") for kind in kinds)))


def test_a_submitted_task_runs_and_no_loop_shows(worker, project, prove):
    """What an operator submits runs; a task that looks on all the while sees no loop but its host's own."""
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
    """Return what the brain has of a task's error: its text is in Celery's traceback only."""
    return f"{row['exception']} {row['traceback']}"


def cancelled(worker, project):
    """Cancel a task that waits for a free slot."""
    *busy, doomed = project.send(*[("waits", 3.0)] * worker.slots, ("add", 40, 2))
    until(lambda: len(project.actions("waits")) >= worker.slots, "a busy worker", timeout=20)
    row = project.command("cancel-task", task_id=doomed)
    assert row["status"] == "completed", row["error"]
    for task_id in busy:
        project.row(task_id, "success")
    project.row(*project.send(("add", 50, 0)), "success")
    assert {40, 50} & {line["x"] for line in project.actions("add")} == {50}


def aborted(worker, project):
    """Cancel a task that runs."""
    (doomed,) = project.send(("waits", 60.0))
    until(lambda: project.actions("waits"), "the running task", timeout=20)
    row = project.command("cancel-task", task_id=doomed)
    assert row["status"] == "completed", row["error"]
    project.row(doomed, "failure" if worker.engine == "arq" else "revoked")
    assert not project.actions("waited")


def retried(worker, project):
    """Run a task again, with the operator's own arguments."""
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


#: What each queue's operator can do beside submitting; taskiq's can nothing.
CONTROLS = {
    "rq": {"cancel_task": cancelled},
    "dramatiq": {"retry_task": retried},
    "huey": {"cancel_task": cancelled},
    "arq": {"cancel_task": aborted},
    "celery": {"retry_task": retried, "cancel_task": aborted},
}


def test_a_control_takes_effect(worker, project, prove):
    """An operator's retry or cancellation, or both where the queue knows both, changes what the worker does."""
    controls = {
        what: act
        for what, act in CONTROLS.get(worker.engine, {}).items()
        if worker.can_abort or act is not aborted
    }
    if not controls:
        pytest.skip("its adapter offers nothing but submit_task")
    for act in controls.values():
        act(worker, project)
    prove(worker.row, "command", ", ".join(f"`{what}`" for what in ("submit_task", *controls)))


def test_a_stop_loses_nothing(worker, project, prove):
    """Asked to leave in the middle of many tasks, the worker ends with 0, and what had run is in the brain or, while that is busy, on disk."""
    before = len(project.actions("add"))
    ids = project.send(*[("add", number, 1) for number in range(60)])
    until(lambda: len(project.actions("add")) > before + 15, "a few tasks", timeout=20)
    os.kill(project.host.pid, worker.stop_signal)
    until(lambda: not project.host.running, "the worker's end", timeout=30)
    assert project.host.exit_code == 0
    ran = len(project.actions("add")) - before
    until(
        lambda: project.count_succeeded(ids) + project.count_buffered() >= ran,
        f"the ends of {ran} tasks, in the brain or on disk",
        timeout=20,
    )
    prove(
        worker.row,
        "clean stop",
        f"{signal.Signals(worker.stop_signal).name}, exit code 0, nothing lost",
    )
