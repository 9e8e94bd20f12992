"""The counts of the tasks, and their limits."""

from datetime import UTC, datetime
from time import time
from types import SimpleNamespace
from uuid import uuid4

import pytest
from z4j_core.models import Event, EventKind
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.engines.celery.task_encoder import TaskEncoder
from z4j_bare.engines.celery.task_state import TaskState, TaskType
from z4j_bare.engines.celery.translate import Translator
from z4j_bare.events import task_counts
from z4j_bare.events.redaction import Redactor
from z4j_bare.events.task_counts import (
    DELAY_BOUNDS,
    MAX_FAILURES,
    OTHER,
    RUNTIME_BOUNDS,
    TaskCounts,
)


@pytest.fixture
def counts():
    """Counts without a task."""
    return TaskCounts()


@pytest.fixture
def encoder(counts):
    """An encoder of Celery's records that counts."""
    return TaskEncoder("celery", Redactor(RedactionEngine()), "w@h", counts)


def row(counts):
    """Return the only row."""
    (found,) = counts.iter_rows()
    return found


def numbers(found):
    """Return the counts of a row that are not zero."""
    return {key: found[key] for key in (*task_counts.KINDS.values(), "failed") if found[key]}


def at(bounds, counts_of):
    """Return the upper bounds of the values in a histogram."""
    return [
        bound
        for bound, number in zip((*bounds, "more"), counts_of, strict=True)
        for _ in range(number)
    ]


def test_encoder_counts_events_of_run(encoder, counts):
    """A run adds one to each of its events, its run time, and its delay since the arrival."""
    task_state = TaskState(TaskType("shop.pay", None), "orders")
    encoder.received((None, 100.0, "t", task_state, None, None, None, None, None))
    encoder.started((None, 100.3, "t", task_state))
    task_state.started_at = 5.0
    encoder.succeeded((None, 102.3, "t", task_state, 7.0, False, None))
    found = row(counts)
    assert numbers(found) == {"received": 1, "started": 1, "succeeded": 1}
    assert (found["engine"], found["worker"], found["name"], found["queue"]) == (
        "celery",
        "w@h",
        "shop.pay",
        "orders",
    )
    assert at(RUNTIME_BOUNDS, found["runtimes"]) == [2.5]
    assert (found["runtime_seconds"], found["delay_seconds"]) == (2.0, pytest.approx(0.3))
    assert at(DELAY_BOUNDS, found["delays"]) == [0.5]


def test_encoder_counts_other_ends_by_kind(encoder, counts):
    """Retries, revocations and failures are counted, failures by exception class."""
    task_state = TaskState(TaskType("shop.pay", None), "orders")
    for kind, own in (
        ("task.retried", {}),
        ("task.failed", {"exception": "KeyError"}),
        ("task.failed", {"exception": "KeyError"}),
        ("task.failed", {"exception": "OSError"}),
        ("task.revoked", {}),
    ):
        encoder.generic((None, 100.0, "t", task_state, kind, own, 1.0))
    assert numbers(row(counts)) == {
        "retried": 1,
        "revoked": 1,
        "failed": {"KeyError": 2, "OSError": 1},
    }
    assert sum(row(counts)["runtimes"]) == 0


def test_last_failures_are_kept_without_texts(encoder, counts):
    """The last failures of all tasks are kept in order, with their class and without their text."""
    for number in range(MAX_FAILURES + 2):
        task_state = TaskState(TaskType(f"shop.pay_{number}", None), "orders")
        own = {"exception": "KeyError", "message": "4929-1234"}
        encoder.generic((None, 100.0, "t", task_state, "task.failed", own, 1.0))
    assert len(counts.failures) == MAX_FAILURES
    last = counts.failures[-1]
    assert last[1:] == (f"shop.pay_{MAX_FAILURES + 1}", "KeyError", "w@h")
    assert time() - 60 < last.at <= time()


def test_encoder_counts_task_with_meta_once(encoder, counts):
    """A task with ``@z4j_meta`` takes another path, and is counted once with its run time."""
    meta = SimpleNamespace(
        skip=False,
        sample_rate=1.0,
        tags=(),
        priority=None,
        expected_duration_ms=None,
        deadline_ms=None,
        keep_kwargs=None,
        redact_kwargs=(),
        redact_result=True,
    )
    task_state = TaskState(TaskType("shop.pay", meta), None)
    task_state.started_at = 5.0
    encoder.succeeded((None, 102.0, "t", task_state, 5.5, True, 1))
    assert numbers(row(counts)) == {"succeeded": 1}
    assert at(RUNTIME_BOUNDS, row(counts)["runtimes"]) == [0.5]


def test_rejected_message_is_counted_without_queue(encoder, counts):
    """A message of an unknown task is counted under the name in the message."""
    own = {"worker": "w@h", "task_name": "shop.gone", "reason": "not registered"}
    encoder.rejected((None, "task.rejected", 100.0, "t", {}, own))
    assert (row(counts)["name"], row(counts)["queue"]) == ("shop.gone", None)
    assert numbers(row(counts)) == {"rejected": 1}


def test_events_of_broker_are_counted_by_worker(counts):
    """The events that the standalone agent reads are counted under the worker that sent them."""
    registry = SimpleNamespace(touch=str, queue_of=lambda *_: "orders")
    adapter = SimpleNamespace(
        celery_app=SimpleNamespace(tasks={}), redaction=RedactionEngine(), name="celery"
    )
    now = time()
    translate = Translator(
        adapter, lambda record: record[0](record), registry, clock=lambda: now, counts=counts
    )
    for offset, kind, fields in (
        (0.0, "task-received", {"name": "shop.pay", "args": "()", "kwargs": "{}"}),
        (0.2, "task-started", {}),
        (1.2, "task-succeeded", {"runtime": 0.9, "result": "1"}),
        (0.0, "task-received", {"uuid": "u", "name": "shop.pay", "args": "()", "kwargs": "{}"}),
        (0.0, "task-failed", {"uuid": "u", "exception": "KeyError('x')"}),
    ):
        event = {"type": kind, "hostname": "w@h", "uuid": "t", "timestamp": now + offset}
        translate({**event, **fields})
    found = row(counts)
    assert (found["worker"], found["queue"]) == ("w@h", "orders")
    assert numbers(found) == {
        "received": 2,
        "started": 1,
        "succeeded": 1,
        "failed": {"KeyError": 1},
    }
    assert at(RUNTIME_BOUNDS, found["runtimes"]) == [1.0]
    assert at(DELAY_BOUNDS, found["delays"]) == [0.5]


def model(kind, **data):
    """Return a captured event of an adapter."""
    event = Event(
        id=uuid4(),
        project_id=uuid4(),
        agent_id=uuid4(),
        engine="rq",
        task_id="t",
        kind=kind,
        occurred_at=datetime(2026, 1, 2, tzinfo=UTC),
        data=data,
    )
    return None, event


def test_events_of_adapter_are_counted(counts):
    """An event of another engine is counted by its kind, name and queue; others are not."""
    own = {"task_name": "jobs.mail", "queue": "default", "worker": "rq-1"}
    counts.encode_model(model(EventKind.TASK_STARTED, **own))
    counts.encode_model(model(EventKind.TASK_SUCCEEDED, **own, runtime_ms=70))
    counts.encode_model(model(EventKind.TASK_FAILED, **own, exception="OSError"))
    counts.encode_model(model(EventKind.WORKER_ONLINE, worker="rq-1"))
    found = row(counts)
    assert (found["engine"], found["worker"], found["queue"]) == ("rq", "rq-1", "default")
    assert numbers(found) == {"started": 1, "succeeded": 1, "failed": {"OSError": 1}}
    assert at(RUNTIME_BOUNDS, found["runtimes"]) == [0.075]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"task_name": 7, "queue": ["q"], "worker": {}, "runtime_ms": "long"},
        {"task_name": "a\x00b\ud800", "queue": "", "runtime_ms": float("nan"), "exception": []},
    ],
)
def test_odd_fields_of_adapter_do_not_lose_event(counts, data):
    """An event with odd fields is counted under some name, and its bytes are returned."""
    assert counts.encode_model(model(EventKind.TASK_SUCCEEDED, **data))
    assert counts.encode_model(model(EventKind.TASK_FAILED, **data))
    assert sum(each["succeeded"] for each in counts.iter_rows()) == 1
    assert row(counts)["runtime_seconds"] == 0


@pytest.mark.parametrize(
    ("limit", "key"), [("MAX_NAMES", "name"), ("MAX_QUEUES", "queue"), ("MAX_WORKERS", "worker")]
)
def test_labels_beyond_limit_are_counted_as_other(counts, monkeypatch, limit, key):
    """Further names, queues and workers share one cell, and no event is left out."""
    monkeypatch.setattr(task_counts, limit, 3)
    for number in range(10):
        labels = {"worker": "w", "name": "n", "queue": "q", key: f"{number}"}
        counts.cell("celery", **labels).add("task.started", {})
    found = {each[key]: each["started"] for each in counts.iter_rows()}
    assert found == {"0": 1, "1": 1, "2": 1, OTHER: 7}
    assert counts.number_of_names() <= 3


def test_combinations_beyond_limit_are_counted_as_other(counts, monkeypatch):
    """The number of cells is limited, too."""
    monkeypatch.setattr(task_counts, "MAX_CELLS", 5)
    for number in range(20):
        counts.cell("celery", "w", f"n{number}", f"q{number}").add("task.started", {})
    rows = list(counts.iter_rows())
    assert len(rows) == 6
    assert sum(each["started"] for each in rows) == 20
    assert rows[-1]["name"] == rows[-1]["queue"] == OTHER


def test_runs_of_dead_process_are_counted_apart(counts):
    """A run that this agent reports for a dead process has a row without a worker."""
    counts.cell("celery", "w", "shop.pay", "q").add("task.started", {})
    data = {"task_name": "shop.pay", "queue": "q", "worker": "w", "exception": "WorkerLostError"}
    counts.report("celery", "task.failed", data)
    own, reported = counts.iter_rows()
    assert (own["worker"], numbers(own)) == ("w", {"started": 1})
    assert (reported["worker"], numbers(reported)) == (None, {"failed": {"WorkerLostError": 1}})
    assert (reported["name"], reported["queue"]) == ("shop.pay", "q")


def test_exception_classes_beyond_limit_are_counted_as_other(counts, monkeypatch):
    """Further exception classes share one count."""
    monkeypatch.setattr(task_counts, "MAX_EXCEPTIONS", 2)
    for number in range(5):
        counts.cell("celery", "w", "n", "q").add("task.failed", {"exception": f"E{number}"})
    assert row(counts)["failed"] == {"E0": 1, "E1": 1, OTHER: 3}
