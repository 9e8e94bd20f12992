"""Celery's events in, the brain's events out."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from z4j_celery.meta import z4j_meta
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.engines.celery.task_state import TaskState, TaskStates, TaskTypes
from z4j_bare.engines.celery.translate import MAX_CLOCK_SKEW, MAX_ID_CHARS, Translator

NOW = 1_700_000_000.25


class WorkerRegistry:
    """Reports every worker but one, and knows one queue."""

    def __init__(self):
        self.told = []

    def touch(self, hostname):
        return None if hostname == "w@theirs" else hostname.replace(".", "_")

    def online(self, hostname):
        self.told.append(("online", hostname))

    def offline(self, hostname):
        self.told.append(("offline", hostname))

    def queue_of(self, hostname, task):
        return f"queue of {hostname}, {task}"


def task(name, **meta):
    def run():
        pass

    run.name = name
    return z4j_meta(**meta)(run) if meta else run


TASKS = [
    task("plain"),
    task("quiet", skip=True),
    task("private", redact_result=True, keep_kwargs=["amount"], tags=["money"], priority="high"),
]


class World:
    """A translator, and what comes out of it."""

    def __init__(self, task_states=None, **switches):
        self.events = []
        self.roster = WorkerRegistry()
        app = SimpleNamespace(tasks={each.name: each for each in TASKS})
        engine = SimpleNamespace(celery_app=app, redaction=RedactionEngine(), name="celery")
        put = lambda record: self.events.append(json.loads(record[0](record)))  # noqa: E731
        self.take = Translator(engine, put, self.roster, task_states, clock=lambda: NOW, **switches)

    def send(self, what, **fields):
        """Take one event, and return the data of what came out of it, if anything did."""
        before = len(self.events)
        self.take({"type": what, "hostname": "w@h", "uuid": "t", "timestamp": NOW, **fields})
        return self.events[-1]["data"] if len(self.events) > before else None


@pytest.fixture
def world():
    return World()


def received(name="plain", **fields):
    return {
        "name": name,
        "args": "(1, 'two')",
        "kwargs": "{'amount': 3, 'password': 'hunter2'}",
        "retries": 0,
        **fields,
    }


def test_a_task_is_told_whole(world):
    """Every event of a task has name, queue and worker, although only the first one brings a name."""
    assert world.send("task-received", **received(root_id="r", parent_id="p")) == {
        "task_name": "plain", "worker": "w@h", "queue": "queue of w@h, plain", "args": [1, "two"],
        "kwargs": {"amount": 3, "password": "[REDACTED]"}, "parent_task_id": "p", "root_task_id": "r",
    }  # fmt: skip
    common = {"task_name": "plain", "worker": "w@h", "queue": "queue of w@h, plain"}
    assert world.send("task-started") == common
    assert world.send("task-succeeded", result="{'n': 5}", runtime=0.0256) == {
        **common, "result": {"n": 5}, "runtime_ms": 25
    }  # fmt: skip
    assert [event["kind"] for event in world.events] == [
        "task.received",
        "task.started",
        "task.succeeded",
    ]
    assert {(event["task_id"], event["engine"]) for event in world.events} == {("t", "celery")}


def test_a_failure(world):
    """A failure has the class of its exception, the text and the traceback, redacted like those of a worker."""
    data = world.send(
        "task-failed", exception="shop.Lost('bob@example.com')", traceback="Traceback: in fails"
    )
    assert (data["exception"], data["traceback"]) == ("Lost", "Traceback: in fails")
    assert data["exception_message"] == "[REDACTED]"
    assert data["task_name"] == "<unknown>"
    assert world.send("task-failed", exception=None)["exception"] == "Exception"


def test_revoked_and_rejected(world):
    """Both say why, and where the task is."""
    assert world.send("task-revoked", terminated=True, signum=15, expired=None)["signum"] == 15
    assert world.send("task-revoked", signum="SIGTERM")["signum"] is None
    assert "back" in world.send("task-rejected", requeue=True)["reason"]
    assert [event["kind"] for event in world.events][-1] == "task.rejected"


def test_retries_are_counted_whatever_comes_first(world):
    """The count starts from the runs before us, and the next run may be received before the retry is told."""
    world.send("task-received", **received(retries=3))
    assert world.send("task-retried", exception="E()")["retry_count"] == 4
    world.send("task-received", **received(retries=5))
    assert world.send("task-retried", exception="E()")["retry_count"] == 5
    seconds = [event["occurred_at"] for event in world.events if event["kind"] == "task.retried"]
    assert int(seconds[1][17:19]) == int(seconds[0][17:19]) + 1


def test_annotations_hold(world):
    """What a task keeps, hides or skips is kept, hidden and skipped, by its name."""
    data = world.send("task-received", **received("private"))
    assert (data["args"], data["kwargs"], data["priority"]) == ("[REDACTED]", {"amount": 3}, "high")
    assert world.send("task-succeeded", result="'it'")["result"] == "[REDACTED]"
    assert world.send("task-received", uuid="q", **received("quiet")) is None
    assert world.send("task-succeeded", uuid="q", result="1") is None
    assert world.send("task-received", uuid="x", **received("theirs"))["task_name"] == "theirs"


def test_switches():
    """Arguments and results stay away when they are not to be sent."""
    world = World(args=False, result=False)
    assert world.send("task-received", **received()).keys().isdisjoint({"args", "kwargs"})
    assert "result" not in world.send("task-succeeded", result="5")


def test_arguments_keep_their_shape(world):
    """The brain reads a list and an object, whatever the text was."""
    data = world.send("task-received", **received(args="<hidden>", kwargs="{'pas...', ...}"))
    assert (data["args"], data["kwargs"]) == (["<hidden>"], {"...": ["pas...", "[... cut]"]})
    data = world.send("task-received", **received(args=None, kwargs=""))
    assert (data["args"], data["kwargs"]) == ([], {})
    data = world.send("task-received", **received(args=[1, {"token": 2}], kwargs={"a": 1}))
    assert (data["args"], data["kwargs"]) == ([1, {"token": "[REDACTED]"}], {"a": 1})


def test_a_producer_knows_the_queue(world):
    """Where producers send events, the queue is theirs; ``task-sent`` itself is not passed on."""
    assert world.send("task-sent", name="plain", queue="theirs", hostname="gen1@producer") is None
    assert world.send("task-received", **received())["queue"] == "theirs"
    world.send("task-started", uuid="late")
    world.send("task-sent", uuid="late", name="plain", queue="late")
    data = world.send("task-succeeded", uuid="late")
    assert data["queue"] == "late"


def test_a_name_that_comes_late_counts(world):
    """A task that ran before us gets its name and its annotations when its next run is received."""
    assert world.send("task-started")["task_name"] == "<unknown>"
    world.send("task-received", **received("private"))
    assert world.send("task-succeeded", result="'it'")["result"] == "[REDACTED]"


def test_in_a_worker_the_signal_tells_who_was_received():
    """With tracks of the signals' handlers, received is not told twice, and the rest has their name and queue."""
    task_states = TaskStates()
    task_states.add("t", TaskState(TaskTypes(lambda _task: None).of("plain"), "q"))
    world = World(task_states)
    assert world.send("task-received", **received()) is None
    assert world.send("task-started") == {"task_name": "plain", "worker": "w@h", "queue": "q"}
    world.send("task-succeeded", result="1")
    assert task_states.get("t") is None


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (NOW - 5, NOW - 5),
        (NOW + MAX_CLOCK_SKEW + 1, NOW),
        (NOW - MAX_CLOCK_SKEW - 1, NOW),
        ("soon", NOW),
        (float("nan"), NOW),
        (None, NOW),
    ],
)
def test_the_time_is_the_worker_s(world, given, used):
    """The worker's clock counts unless it is far off: every agent that reads the event must give it the same second."""
    world.send("task-started", timestamp=given)
    told = world.events[0]["occurred_at"]
    world.send("task-started", uuid="other", timestamp=used)
    assert told == world.events[1]["occurred_at"]


def test_workers_come_and_go(world):
    """The roster hears of both; a worker that is not ours to report is left alone, and other groups' events too."""
    world.send("worker-online")
    world.send("worker-offline")
    world.send("worker-heartbeat")
    world.send("custom-event")
    assert world.send("task-started", hostname="w@theirs") is None
    assert world.roster.told == [("online", "w@h"), ("offline", "w@h")]
    assert world.events == []


KNOWN = (
    "task-sent",
    "task-received",
    "task-started",
    "task-succeeded",
    "task-failed",
    "task-retried",
    "task-revoked",
)
FIELDS = (
    "uuid",
    "name",
    "args",
    "kwargs",
    "result",
    "runtime",
    "exception",
    "traceback",
    "retries",
    "signum",
    "queue",
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "type": st.sampled_from((*KNOWN, "worker-online", "task-rejected")) | junk,
                "hostname": st.just("w@h") | junk,
            },
            optional={
                **dict.fromkeys(FIELDS, junk),
                "uuid": st.just("t") | junk,
                "timestamp": junk,
            },
        )
        | junk,
        max_size=6,
    )
)
def test_garbage_is_refused_with_an_ordinary_error(events):
    """Whatever comes is told as JSON that the brain can read, or refused with an error that the stream counts."""
    world = World()
    for event in events:
        try:
            world.take(event)
        except (TypeError, ValueError, LookupError, AttributeError):
            continue
    for event in world.events:
        assert 0 < len(event["task_id"]) <= MAX_ID_CHARS
        assert isinstance(event["data"].get("args", []), list)
        assert isinstance(event["data"].get("kwargs", {}), dict)
