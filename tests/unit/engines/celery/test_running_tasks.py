"""The list of running tasks of a Celery worker."""

import json
from time import perf_counter, time
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.worker import state
from greenlet import greenlet

from z4j_bare.engines.celery.running_tasks import RunningTasks, TaskQuery
from z4j_bare.engines.celery.task_state import TaskState, TaskStates, TaskType


@pytest.fixture
def app():
    """An application with one task."""
    with Celery("shop", broker="memory://", set_as_current=False) as made:
        made.task(name="shop.pay", shared=False)(pay)
        yield made


def pay():
    """Stand for the function of the task."""


@pytest.fixture
def waiting(backend, until):
    """``waiting()``: the context of a task that waits in ``charge``, until the end of the test."""
    event, tasks = backend.event(), []

    def start():
        contexts = []

        def charge():
            contexts.append(backend.context_getter()())
            backend.wait(event)

        tasks.append(backend.spawn(charge, name="charge"))
        until(lambda: contexts)
        until(lambda: backend.frame_reader()(contexts[0]) is not None)
        return contexts[0]

    yield start
    event.set()
    for task in tasks:
        task.join(10)


def started(context, age, name="shop.pay", queue="celery"):
    """Return the state of a run that started ``age`` seconds ago."""
    task_state = TaskState(TaskType(name, None), queue)
    task_state.started_at = perf_counter() - age
    task_state.context = context
    return task_state


def rows(app, states, backend, query=None, in_process=True):
    """Return the rows after a round trip through JSON."""
    tasks = RunningTasks(app, states, "w@host", backend, in_process=in_process)
    return json.loads(json.dumps(list(tasks.iter_rows(query or TaskQuery(), lambda: None))))


def test_longest_run_comes_first_with_its_position(app, waiting, backend):
    """Each run has its task, worker, queue, age and position; received tasks are not listed."""
    states = TaskStates()
    states.add("young", started(waiting(), 2.0))
    states.add("old", started(waiting(), 60.0, queue="slow"))
    states.add("received", TaskState(TaskType("shop.pay", None), "celery"))
    old, young = rows(app, states, backend)
    assert (old["id"], old["name"], old["worker"], old["queue"]) == (
        "old",
        "shop.pay",
        "w@host",
        "slow",
    )
    assert 60 <= old["age_seconds"] < 90
    assert young["id"] == "young"
    assert young["position"].endswith("charge")
    assert "stack" not in young


def test_stack_contains_files_and_names_only(app, waiting, backend):
    """A stack has positions and names of variables, without the frames of a hub."""
    states = TaskStates()
    states.add("one", started(waiting(), 1.0))
    (row,) = rows(app, states, backend, TaskQuery(stack=True))
    (frame,) = [each for each in row["stack"] if each["function"].endswith("charge")]
    assert set(frame) == {"file", "line", "function", "module", "locals"}
    assert frame["file"] == __file__
    assert not any(
        each["module"].startswith(("gevent._hub", "eventlet.hubs")) for each in row["stack"]
    )


def test_thousand_tasks_are_read_in_slices(app, backend, mode):
    """The hub can run other greenlets between two tasks, and each finished row is complete."""
    contexts = range(1, 1001) if mode == "threads" else [greenlet(pay) for _ in range(1000)]
    states, listed, slices = TaskStates(), set(), []
    for number, context in enumerate(contexts):
        states.add(str(number), started(context, 1.0))
    tasks = RunningTasks(app, states, "w@host", backend, in_process=True)
    for row in tasks.iter_rows(TaskQuery(stack=True), lambda: slices.append(len(listed))):
        listed.add(row["id"])
    assert len(listed) == 1000
    assert slices == list(range(1000))


def test_query_selects_one_task(app, waiting, backend):
    """Only the task with the requested id is listed."""
    states, context = TaskStates(), waiting()
    for task_id in ("a", "b"):
        states.add(task_id, started(context, 1.0))
    (row,) = rows(app, states, backend, TaskQuery(task="b"))
    assert row["id"] == "b"


def test_eager_task_is_listed_within_its_caller(app, waiting, backend):
    """A task that another task runs eagerly is part of that task's row."""
    states, context = TaskStates(), waiting()
    states.add("outer", started(context, 5.0))
    states.add("inner", started(context, 1.0, "shop.refund"))
    (row,) = rows(app, states, backend)
    assert row["id"] == "outer"
    assert [(each["id"], each["name"]) for each in row["eager"]] == [("inner", "shop.refund")]


def test_unsampled_task_is_listed(app, backend, monkeypatch):
    """A task without events has a row without a position, because its greenlet is unknown."""
    request = SimpleNamespace(id="skipped", name="shop.pay", time_start=time() - 3, worker_pid=1)
    waits = SimpleNamespace(id="accepted-not-started", name="shop.pay", time_start=None)
    monkeypatch.setattr(state, "active_requests", [request, waits])
    (row,) = rows(app, TaskStates(), backend)
    assert (row["id"], row["position"]) == ("skipped", None)
    assert 3 <= row["age_seconds"] < 30


def test_prefork_run_has_pid_of_child(app, backend, monkeypatch):
    """The runs of a prefork worker show the pid of the child and no position."""
    request = SimpleNamespace(id="x", name="shop.pay", time_start=time() - 3, worker_pid=4711)
    monkeypatch.setattr(state, "active_requests", [request])
    (row,) = rows(app, TaskStates(), backend, in_process=False)
    assert (row["id"], row["pid"]) == ("x", 4711)
    assert "position" not in row
