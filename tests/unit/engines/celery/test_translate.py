"""The translation of Celery's events to the brain's."""

import json
from types import SimpleNamespace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from z4j_celery.meta import z4j_meta
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.engines.celery.translate import MAX_CLOCK_SKEW, MAX_ID_CHARS, Translator

NOW = 1_700_000_000.25


class FakeRegistry:
    """Reports every worker but one; its ``calls`` are recorded."""

    def __init__(self):
        self.calls = []

    def touch(self, hostname):
        return None if hostname == "w@other" else hostname.replace(".", "_")

    def online(self, hostname):
        self.calls.append(("online", hostname))

    def offline(self, hostname):
        self.calls.append(("offline", hostname))

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


class TranslatorHarness:
    """A translator, and the events that it produces."""

    def __init__(self, **switches):
        self.events = []
        self.workers = FakeRegistry()
        app = SimpleNamespace(tasks={each.name: each for each in TASKS})
        engine = SimpleNamespace(celery_app=app, redaction=RedactionEngine(), name="celery")
        put = lambda record: self.events.append(json.loads(record[0](record)))  # noqa: E731
        self.translate = Translator(engine, put, self.workers, clock=lambda: NOW, **switches)

    def send(self, event_type, **fields):
        """Translate an event; return the data of the result, ``None`` if there is none."""
        before = len(self.events)
        self.translate(
            {"type": event_type, "hostname": "w@h", "uuid": "t", "timestamp": NOW, **fields}
        )
        return self.events[-1]["data"] if len(self.events) > before else None


@pytest.fixture
def harness():
    return TranslatorHarness()


def received(name="plain", **fields):
    return {
        "name": name,
        "args": "(1, 'two')",
        "kwargs": "{'amount': 3, 'password': 'hunter2'}",
        "retries": 0,
        **fields,
    }


def test_translator_completes_all_events_of_a_task(harness):
    """Every event has the task's name, queue and worker, although only the first one carries the
    name.
    """
    assert harness.send("task-received", **received(root_id="r", parent_id="p")) == {
        "task_name": "plain",
        "worker": "w@h",
        "queue": "queue of w@h, plain",
        "args": [1, "two"],
        "kwargs": {"amount": 3, "password": "[REDACTED]"},
        "parent_task_id": "p",
        "root_task_id": "r",
    }
    common = {"task_name": "plain", "worker": "w@h", "queue": "queue of w@h, plain"}
    assert harness.send("task-started") == common
    assert harness.send("task-succeeded", result="{'n': 5}", runtime=0.0256) == {
        **common, "result": {"n": 5}, "runtime_ms": 25
    }  # fmt: skip
    assert [event["kind"] for event in harness.events] == [
        "task.received",
        "task.started",
        "task.succeeded",
    ]
    assert {(event["task_id"], event["engine"]) for event in harness.events} == {("t", "celery")}


def test_translator_reports_failure(harness):
    """A failure has the exception's class, message and traceback, redacted."""
    data = harness.send(
        "task-failed", exception="shop.Lost('bob@example.com')", traceback="Traceback: in fails"
    )
    assert (data["exception"], data["traceback"]) == ("Lost", "Traceback: in fails")
    assert data["exception_message"] == "[REDACTED]"
    assert data["task_name"] == "<unknown>"
    assert harness.send("task-failed", exception=None)["exception"] == "Exception"


def test_translator_reports_revoked_and_rejected(harness):
    """Both events carry their reason."""
    assert harness.send("task-revoked", terminated=True, signum=15, expired=None)["signum"] == 15
    assert harness.send("task-revoked", signum="SIGTERM")["signum"] is None
    assert "back" in harness.send("task-rejected", requeue=True)["reason"]
    assert [event["kind"] for event in harness.events][-1] == "task.rejected"


def test_translator_counts_retries_in_any_order(harness):
    """The count starts from earlier runs, and the next run may be received before the retry is
    reported.
    """
    harness.send("task-received", **received(retries=3))
    assert harness.send("task-retried", exception="E()")["retry_count"] == 4
    harness.send("task-received", **received(retries=5))
    assert harness.send("task-retried", exception="E()")["retry_count"] == 5
    seconds = [event["occurred_at"] for event in harness.events if event["kind"] == "task.retried"]
    assert int(seconds[1][17:19]) == int(seconds[0][17:19]) + 1


def test_translator_applies_task_meta(harness):
    """``@z4j_meta`` keeps, redacts and skips by task name."""
    data = harness.send("task-received", **received("private"))
    assert (data["args"], data["kwargs"], data["priority"]) == ("[REDACTED]", {"amount": 3}, "high")
    assert harness.send("task-succeeded", result="'it'")["result"] == "[REDACTED]"
    assert harness.send("task-received", uuid="q", **received("quiet")) is None
    assert harness.send("task-succeeded", uuid="q", result="1") is None
    assert harness.send("task-received", uuid="x", **received("theirs"))["task_name"] == "theirs"


def test_translator_omits_arguments_and_results_when_disabled():
    """Disabled arguments and results are not sent."""
    harness = TranslatorHarness(args=False, result=False)
    assert harness.send("task-received", **received()).keys().isdisjoint({"args", "kwargs"})
    assert "result" not in harness.send("task-succeeded", result="5")


def test_translator_sends_list_and_object_as_arguments(harness):
    """The brain gets a list and an object, whatever the text was."""
    data = harness.send("task-received", **received(args="<hidden>", kwargs="{'pas...', ...}"))
    assert (data["args"], data["kwargs"]) == (["<hidden>"], {"...": ["pas...", "[... cut]"]})
    data = harness.send("task-received", **received(args=None, kwargs=""))
    assert (data["args"], data["kwargs"]) == ([], {})
    data = harness.send("task-received", **received(args=[1, {"token": 2}], kwargs={"a": 1}))
    assert (data["args"], data["kwargs"]) == ([1, {"token": "[REDACTED]"}], {"a": 1})


def test_translator_takes_queue_from_task_sent(harness):
    """If producers send events the queue is theirs; ``task-sent`` itself is not reported."""
    assert harness.send("task-sent", name="plain", queue="theirs", hostname="gen1@producer") is None
    assert harness.send("task-received", **received())["queue"] == "theirs"
    harness.send("task-started", uuid="late")
    harness.send("task-sent", uuid="late", name="plain", queue="late")
    data = harness.send("task-succeeded", uuid="late")
    assert data["queue"] == "late"


def test_translator_accepts_uuid_ids(harness):
    """Ids that are ``uuid.UUID`` objects are reported as text."""
    task_id = UUID(int=7)
    data = harness.send("task-received", **received(uuid=task_id, root_id=task_id))
    assert data["root_task_id"] == str(task_id)
    harness.send("task-succeeded", uuid=task_id, result="1", runtime=0.1)
    assert {event["task_id"] for event in harness.events} == {str(task_id)}


def test_translator_gives_replacement_its_own_name_and_queue(harness):
    """A task that replaces another one has its own name, queue, annotations and seconds."""
    harness.send("task-received", **received())
    harness.send("task-started")
    harness.send("task-sent", name="private", queue="second")
    assert harness.send("task-received", **received("private"))["task_name"] == "private"
    harness.send("task-started")
    data = harness.send("task-succeeded", result="1", runtime=0.1)
    assert (data["task_name"], data["queue"]) == ("private", "second")
    assert data["result"] == "[REDACTED]"
    assert harness.events[1]["data"]["queue"] == "queue of w@h, plain"
    seconds = [(event["kind"], event["occurred_at"][:19]) for event in harness.events]
    assert len(set(seconds)) == len(seconds)


def test_translator_accepts_late_task_name(harness):
    """A task that started before the agent gets its name and ``@z4j_meta`` with its next run."""
    assert harness.send("task-started")["task_name"] == "<unknown>"
    harness.send("task-received", **received("private"))
    assert harness.send("task-succeeded", result="'it'")["result"] == "[REDACTED]"


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
def test_translator_uses_worker_clock_within_skew(harness, given, used):
    """The worker's timestamp is used unless it is far off."""
    harness.send("task-started", timestamp=given)
    occurred_at = harness.events[0]["occurred_at"]
    harness.send("task-started", uuid="other", timestamp=used)
    assert occurred_at == harness.events[1]["occurred_at"]


def test_translator_reports_workers_to_registry(harness):
    """The registry gets online and offline; workers not reported and other event groups are
    ignored.
    """
    harness.send("worker-online")
    harness.send("worker-offline")
    harness.send("worker-heartbeat")
    harness.send("custom-event")
    assert harness.send("task-started", hostname="w@other") is None
    assert harness.workers.calls == [("online", "w@h"), ("offline", "w@h")]
    assert harness.events == []


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
arbitrary = st.recursive(
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
                "type": st.sampled_from((*KNOWN, "worker-online", "task-rejected")) | arbitrary,
                "hostname": st.just("w@h") | arbitrary,
            },
            optional={
                **dict.fromkeys(FIELDS, arbitrary),
                "uuid": st.just("t") | arbitrary,
                "timestamp": arbitrary,
            },
        )
        | arbitrary,
        max_size=6,
    )
)
def test_translator_rejects_malformed_events(events):
    """Any input becomes JSON for the brain, or raises an error that the receiver counts."""
    harness = TranslatorHarness()
    for event in events:
        try:
            harness.translate(event)
        except (TypeError, ValueError, LookupError, AttributeError):
            continue
    for event in harness.events:
        assert 0 < len(event["task_id"]) <= MAX_ID_CHARS
        assert isinstance(event["data"].get("args", []), list)
        assert isinstance(event["data"].get("kwargs", {}), dict)
