"""The adapter's own event stream, completed."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from z4j_celery.meta import z4j_meta
from z4j_core.models import Event, EventKind
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.capture.stream import CeleryStream

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def task(name, **meta):
    def run():
        pass

    run.name = name
    return z4j_meta(**meta)(run) if meta else run


@pytest.fixture
def stream():
    tasks = [
        task("plain"), task("quiet", skip=True), task("private", redact_result=True, tags=["money"], priority="high")
    ]  # fmt: skip
    app = SimpleNamespace(tasks={each.name: each for each in tasks})
    return CeleryStream(SimpleNamespace(celery_app=app), RedactionEngine().value_matches)


def event(kind, task_id="t", at=0.0, **data):
    return Event(
        id=uuid4(), project_id=uuid4(), agent_id=uuid4(), engine="celery", task_id=task_id, kind=EventKind(kind),
        occurred_at=NOW + timedelta(seconds=at), data=data,
    )  # fmt: skip


def test_a_dotted_worker_is_renamed(stream):
    """The worker's name is the one that the brain keeps, as in events captured in process."""
    fields = stream.complete(event("task.started", task_name="plain", worker="w@web-1.example.com"))
    assert fields["data"]["worker"] == "w@web-1_example_com"


def test_annotations_reach_events_that_only_know_a_name(stream):
    """A private result is hidden, tags and priority are added, and a skipped task is not reported."""
    fields = stream.complete(event("task.succeeded", task_name="private", result="'it'"))
    assert fields["data"] == {"task_name": "private", "result": "[REDACTED]", "tags": ["money"], "priority": "high"}
    assert stream.complete(event("task.started", task_name="quiet")) is None


def test_name_and_queue_are_filled_in_from_the_first_event(stream):
    """An event that lacks them gets the name and queue that ``task.received`` had."""
    stream.complete(event("task.received", task_name="plain", queue="q"))
    assert stream.complete(event("task.started"))["data"] == {"task_name": "plain", "queue": "q"}


def test_retries_are_counted_and_kept_apart(stream):
    """Two retries within one second get the counts 1 and 2 and seconds of their own, and time never goes back."""
    first, second = (stream.complete(event("task.retried", at=at, task_name="plain")) for at in (0.1, 0.3))
    assert [fields["data"]["retry_count"] for fields in (first, second)] == [1, 2]
    stamps = [datetime.fromisoformat(fields["occurred_at"]) for fields in (first, second)]
    assert int(stamps[1].timestamp()) == int(stamps[0].timestamp()) + 1
    last = stream.complete(event("task.succeeded", at=0.5, task_name="plain"))
    assert datetime.fromisoformat(last["occurred_at"]) >= stamps[1]


def test_a_task_that_ended_is_forgotten(stream):
    """A second run under the same id starts to count anew."""
    stream.complete(event("task.retried", task_name="plain"))
    stream.complete(event("task.failed", task_name="plain"))
    assert stream.complete(event("task.retried", task_name="plain"))["data"]["retry_count"] == 1


def test_an_unknown_name_and_an_event_without_a_task_pass(stream):
    """What this app has no task for is passed on as it came."""
    assert stream.complete(event("task.started", task_name="theirs"))["data"] == {"task_name": "theirs"}
    assert stream.complete(event("worker.online", task_id="", worker="w@h"))["data"] == {"worker": "w@h"}
