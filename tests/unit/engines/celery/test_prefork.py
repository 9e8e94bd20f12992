"""Capture in a prefork worker: children that are forked here, and their parent."""

import json
import os
import time
from types import SimpleNamespace

import pytest
from celery import signals
from celery.concurrency.prefork import TaskPool as Prefork
from celery.exceptions import Ignore, Reject, Retry, TimeLimitExceeded, WorkerLostError
from z4j_celery import CeleryEngineAdapter
from z4j_celery.meta import z4j_meta

from tests.support.celery_fakes import memory_app, receive, task_request, trace, worker_consumer
from tests.support.processes import in_child
from z4j_bare.engines.celery import prefork_parent
from z4j_bare.engines.celery.channel import ABSENT, PRESENT, UNDECIDED
from z4j_bare.engines.celery.prefork import prefork
from z4j_bare.engines.celery.prefork_parent import MAX_PARENT_ENDS, PreforkCapture
from z4j_bare.engines.celery.worker_start import CHANNEL_VARIABLE
from z4j_bare.engines.engine import describe_engine
from z4j_bare.events.ring import Ring
from z4j_bare.settings import Settings


@pytest.fixture
def app():
    app = memory_app()

    @app.task(shared=False, name="shop.add")
    def add(a, b=0, **_kwargs):
        return a + b

    @app.task(shared=False, name="shop.fail")
    def fail():
        raise ValueError("broken")

    @app.task(shared=False, name="shop.returns")
    def returns(value):
        return {"api_key": "hunter2", "value": "x" * value}

    @app.task(shared=False, name="shop.late", acks_late=True, reject_on_worker_lost=True)
    def late():
        os._exit(3)

    @app.task(shared=False, name="shop.hides")
    @z4j_meta(redact_result=True)
    def hides():
        return "private"

    @app.task(shared=False, name="shop.skipped")
    @z4j_meta(skip=True)
    def skipped():
        raise Ignore

    yield app
    app.close()


@pytest.fixture(autouse=True)
def closed_channel():
    yield
    prefork.close()


class Parent:
    """The parent of a prefork worker, without its loop."""

    def __init__(self, app, backend, polling, **settings):
        prefork.open().counters.polling = polling
        self.app = app
        self.ring = Ring(10_000, 10_000, backend.event())
        self.consumer = worker_consumer(Prefork)
        self.pids = []
        children = SimpleNamespace(_pool=self.pids, _fileno_to_outq={})
        self.consumer.pool._pool = children
        self.source = describe_engine(CeleryEngineAdapter(celery_app=app)).make_source(
            self.ring, Settings(**settings), backend, self.consumer
        )
        self.source.presence.online = lambda _name: None
        self.source.connect()
        self.capture = self.source._capture

    def child(self, *calls):
        """Run ``calls`` in a child of the pool."""

        def run():
            signals.worker_process_init.send(sender="w@h")
            for call in calls:
                call()

        return in_child(run)

    def runs(self, *tasks):
        """Run tasks ``(name, id, *args)`` in one child of the pool."""
        calls = [
            lambda name=name, task_id=task_id, args=args: trace(self.app, name, task_id, args)
            for name, task_id, *args in tasks
        ]
        assert self.child(*calls) == 0

    def events(self):
        """Return what has been captured since the last call, and the starts that are kept."""
        self.capture.drain()
        self.capture.drain()
        records = self.ring.take(10_000)
        return [json.loads(record[0](record)) for record in records]

    def kinds(self):
        return [event["kind"] for event in self.events()]


@pytest.fixture(params=[0, 1], ids=["waiting", "polling"])
def parent(request, app, backend):
    """Builds a parent that waits for messages, or one whose children keep starts."""
    made = []

    def build(**settings):
        made.append(Parent(app, backend, request.param, **settings))
        return made[-1]

    yield build
    for each in made:
        each.source.disconnect()


def fail_in_parent(app, name, task_id, error):
    """Send ``task_failure`` as the worker's request does."""
    signals.task_failure.send(
        sender=app.tasks[name],
        task_id=task_id,
        exception=error,
        einfo=SimpleNamespace(traceback="Traceback: here"),
    )


def test_run_of_child_is_reported_by_parent(app, parent):
    """A child's run has start, result as a value redacted by key, queue, worker and run time."""
    here = parent()
    receive(app, "shop.returns", "t", [3])
    here.runs(("shop.returns", "t", 3))
    received, started, succeeded = here.events()
    assert [received["kind"], started["kind"], succeeded["kind"]] == [
        "task.received",
        "task.started",
        "task.succeeded",
    ]
    assert succeeded["data"]["result"] == {"api_key": "[REDACTED]", "value": "xxx"}
    assert succeeded["data"]["runtime_ms"] >= 0
    for event in (received, started, succeeded):
        assert (event["data"]["queue"], event["data"]["worker"]) == ("q", "w@h")
    assert received["occurred_at"] <= started["occurred_at"] <= succeeded["occurred_at"]
    assert here.capture._runs.open == {}
    assert here.capture._runs._task_states == {}


def test_failure_of_child_has_class_message_and_traceback(app, parent):
    """A child's failure has the exception's class, its message and its traceback."""
    here = parent()
    receive(app, "shop.fail")
    here.runs(("shop.fail", "t1"))
    failed = here.events()[-1]
    assert failed["kind"] == "task.failed"
    assert (failed["data"]["exception"], failed["data"]["exception_message"]) == (
        "ValueError",
        "broken",
    )
    assert "in fail" in failed["data"]["traceback"]


def test_large_result_is_truncated_as_in_other_pools(app, parent):
    """A result over the limits arrives truncated, by the snapshot's own rules."""
    here = parent()
    receive(app, "shop.returns", "t", [100_000])
    here.runs(("shop.returns", "t", 100_000))
    assert "more characters cut]" in str(here.events()[-1]["data"]["result"])


def test_annotations_apply_to_runs_of_children(app, parent):
    """``@z4j_meta`` is applied by the parent: skipped tasks have no event and no state."""
    here = parent()
    receive(app, "shop.hides", "h")
    receive(app, "shop.skipped", "s")
    here.runs(("shop.hides", "h"), ("shop.skipped", "s"))
    events = here.events()
    assert {event["task_id"] for event in events} == {"h"}
    assert events[-1]["data"]["result"] == "[REDACTED]"
    assert here.capture._runs._task_states == {}


def test_capture_switch_removes_results(app, parent):
    """``Z4J_CAPTURE_RESULT=0`` and ``Z4J_CAPTURE_ARGS=0`` hold although the child sends both."""
    here = parent(capture_result=False, capture_args=False)
    receive(app, "shop.add", "t", [1])
    here.runs(("shop.add", "t", 1))
    assert all(event["data"].keys().isdisjoint({"args", "result"}) for event in here.events())


def test_end_in_parent_follows_notes_of_children(app, parent):
    """A failure that the parent signals does not overtake the start in the channel."""
    here = parent()
    receive(app, "shop.add", "t", [1])
    assert (
        here.child(lambda: signals.task_prerun.send(None, task_id="t", task=app.tasks["shop.add"]))
        == 0
    )
    fail_in_parent(app, "shop.add", "t", WorkerLostError("Worker exited prematurely: signal 9"))
    events = here.events()
    assert [event["kind"] for event in events] == ["task.received", "task.started", "task.failed"]
    assert events[-1]["data"]["exception"] == "WorkerLostError"
    assert "signal 9" in events[-1]["data"]["exception_message"]


def test_hard_time_limit_is_reported_once(app, parent):
    """Celery sends ``task_failure`` twice at a hard time limit; the brain gets one failure."""
    here = parent()
    receive(app, "shop.add", "t", [1])
    for _ in range(2):
        fail_in_parent(app, "shop.add", "t", TimeLimitExceeded(3))
        fail_in_parent(app, "shop.add", "t", TimeLimitExceeded(3))
        events = here.events()
    assert events == []


def test_late_notes_of_ended_run_are_dropped(app, parent):
    """What a child notes after its run was ended by the parent is not reported."""
    here = parent()
    receive(app, "shop.add", "t", [1])
    fail_in_parent(app, "shop.add", "t", TimeLimitExceeded(3))
    assert here.kinds() == ["task.received", "task.failed"]
    here.runs(("shop.add", "t", 1))
    assert here.kinds() == []
    receive(app, "shop.add", "t", [1])
    here.runs(("shop.add", "t", 1))
    assert here.kinds() == ["task.received", "task.started", "task.succeeded"]


def test_second_arrival_follows_first_run(app, parent):
    """A task that is received again is reported after the events of its first run."""
    here = parent()
    receive(app, "shop.add", "t", [1])
    assert here.kinds() == ["task.received"]
    task = app.tasks["shop.add"]

    def retries():
        signals.task_prerun.send(None, task_id="t", task=task)
        request = task_request(app, "shop.add", "t")
        signals.task_retry.send(task, request=request, reason=Retry("again"))

    assert here.child(retries) == 0
    receive(app, "shop.add", "t", [1])
    here.runs(("shop.add", "t", 1))
    assert here.kinds() == [
        "task.started",
        "task.retried",
        "task.received",
        "task.started",
        "task.succeeded",
    ]


def test_next_run_received_before_notes_of_previous_one(app, parent):
    """A run that is received before its predecessor's end is read shares no state with it, and
    nothing is remembered of either.
    """
    here = parent()
    receive(app, "shop.add", "t", [1])
    task = app.tasks["shop.add"]
    assert here.child(lambda: signals.task_prerun.send(None, task_id="t", task=task)) == 0
    kinds = here.kinds()

    def retries():
        request = task_request(app, "shop.add", "t")
        signals.task_retry.send(task, request=request, reason=Retry("again"))

    assert here.child(retries) == 0
    request = task_request(app, "shop.add", "t", [1])
    request.request_dict = {"retries": 1}
    signals.task_received.send(sender=None, request=request)

    def second():
        task.push_request(id="t", retries=1)
        signals.task_prerun.send(None, task_id="t", task=task)
        signals.task_postrun.send(None, task_id="t", task=task, retval=2, state="SUCCESS")

    assert here.child(second) == 0
    kinds += here.kinds()
    assert kinds == [
        "task.received",
        "task.started",
        "task.retried",
        "task.received",
        "task.started",
        "task.succeeded",
    ]
    assert here.capture._runs._task_states == here.capture._runs.open == {}


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("alive", [True, False])
def test_start_of_retry_follows_note_of_previous_child(app, parent, alive, read):
    """If another child starts the retry first, that start is the last event, and its run is open
    after the note of the previous run. The same holds if the previous child has exited, and if its
    start is read after the arrival of the retry.
    """
    here = parent()
    receive(app, "shop.add", "t", [1])
    task = app.tasks["shop.add"]
    assert here.child(lambda: signals.task_prerun.send(None, task_id="t", task=task)) == 0
    kinds = here.kinds() if read else []
    request = task_request(app, "shop.add", "t", [1])
    request.request_dict = {"retries": 1}
    signals.task_received.send(sender=None, request=request)

    def starts_again():
        task.push_request(id="t", retries=1)
        signals.task_prerun.send(None, task_id="t", task=task)

    def retries():
        request = task_request(app, "shop.add", "t")
        signals.task_retry.send(task, request=request, reason=Retry("again"))

    if alive and read:
        here.pids.append(SimpleNamespace(pid=here.capture._runs.open["t"].pid))
    assert here.child(starts_again) == 0
    kinds += here.kinds()
    second = here.capture._runs.open["t"]
    assert here.child(retries) == 0
    events = here.events()
    kinds += [event["kind"] for event in events]
    assert kinds[:1] + sorted(kinds[1:3]) + kinds[3:] == [
        "task.received",
        "task.received",
        "task.started",
        "task.retried",
        "task.started",
    ]
    assert events[0]["occurred_at"] <= events[1]["occurred_at"]
    assert here.capture._runs.open == {"t": second}


@pytest.mark.parametrize("reading", [True, False])
def test_requeue_loop_of_children_does_not_flood(reading, app, parent):
    """A task that children return to the queue again and again is reported once a second."""
    here = parent()

    @app.task(shared=False, name="shop.rejects", acks_late=True)
    def rejects():
        raise Reject("later", requeue=True)

    start = time.monotonic()
    for _ in range(20):
        receive(app, "shop.rejects", "t")
        here.runs(("shop.rejects", "t"))
        if reading:
            here.capture.drain()
    kinds = here.kinds()
    assert kinds.count("task.received") == 1
    assert kinds.count("task.retried") <= 3 + (time.monotonic() - start)
    assert kinds.count("task.started") <= 3 + (time.monotonic() - start)


def test_revoked_task_is_reported_by_parent(app, parent):
    """A revoked task is reported whether or not its arrival is known, and once."""
    here = parent()
    receive(app, "shop.add", "known")
    for task_id in ("known", "unknown", "unknown"):
        request = task_request(app, "shop.add", task_id)
        signals.task_revoked.send(
            app.tasks["shop.add"], request=request, terminated=False, signum=None, expired=True
        )
    events = here.events()
    assert [(event["kind"], event["task_id"]) for event in events] == [
        ("task.received", "known"),
        ("task.revoked", "known"),
        ("task.revoked", "unknown"),
    ]


def test_parent_remembers_bounded_number_of_ends(app, parent):
    """The memory of tasks that the parent has ended is bounded."""
    here = parent()
    for number in range(MAX_PARENT_ENDS + 10):
        receive(app, "shop.add", str(number))
        fail_in_parent(app, "shop.add", str(number), WorkerLostError("gone"))
    assert len(here.events()) == 2 * (MAX_PARENT_ENDS + 10)
    assert len(here.capture._runs._parent_ends) == MAX_PARENT_ENDS


def vanish(here, name, task_id):
    """Start a task in a child that vanishes, and let the delay pass; return the last events."""
    receive(here.app, name, task_id)
    task = here.app.tasks[name]
    assert here.child(lambda: signals.task_prerun.send(None, task_id=task_id, task=task)) == 0
    assert here.kinds() == ["task.received", "task.started"]
    runs = here.capture._runs
    assert runs.check(100.0) == []
    assert runs.check(101.0) == []
    (pid,) = runs.check(103.0)
    assert pid not in (0, os.getpid())
    assert runs.open == {}
    return here.events()


def test_vanished_child_of_late_task_is_retry(app, parent):
    """A run of a child that vanished, and whose message returned to its queue, is a retry."""
    (event,) = vanish(parent(), "shop.late", "t")
    assert event["kind"] == "task.retried"
    assert "returned" in event["data"]["reason"]


def test_vanished_child_without_result_is_failure(app, parent):
    """A run of a child that vanished without any report is a ``WorkerLostError``."""
    here = parent()
    (event,) = vanish(here, "shop.add", "t")
    assert (event["kind"], event["data"]["exception"]) == ("task.failed", "WorkerLostError")
    assert here.capture._runs._task_states == {}


@pytest.mark.parametrize("name", ["shop.add", "shop.late"])
def test_vanished_child_has_stored_result(name, app, parent):
    """A run whose success was stored before its child vanished is a success with that result."""
    app.backend.store_result("stored", {"api_key": "hunter2"}, "SUCCESS")
    (event,) = vanish(parent(), name, "stored")
    assert event["kind"] == "task.succeeded"
    assert event["data"]["result"] == {"api_key": "[REDACTED]"}


def test_living_child_keeps_its_run(app, parent):
    """A run is not resolved as long as the pool has its child, or is being replaced."""
    here = parent()
    receive(app, "shop.add", "t")
    task = app.tasks["shop.add"]
    assert here.child(lambda: signals.task_prerun.send(None, task_id="t", task=task)) == 0
    here.events()
    (run,) = here.capture._runs.open.values()
    here.pids.append(SimpleNamespace(pid=run.pid))
    assert here.capture._runs.check(100.0) == here.capture._runs.check(200.0) == []
    here.consumer.pool._pool = None
    assert here.capture._runs.check(300.0) == []
    assert "t" in here.capture._runs.open


def test_second_start_reports_retry_of_vanished_run(app, parent):
    """If a task starts again before its first child is missed, the retry precedes the start."""
    here = parent()
    receive(app, "shop.late", "t")
    task = app.tasks["shop.late"]
    for _ in range(2):
        assert here.child(lambda: signals.task_prerun.send(None, task_id="t", task=task)) == 0
    assert here.kinds() == ["task.received", "task.started", "task.retried", "task.started"]


def test_grandchildren_send_nothing(app, parent):
    """A process that a task forks does not report the tasks that it runs."""
    here = parent()
    assert here.child(lambda: in_child(lambda: trace(app, "shop.add", "t", (1,)))) == 0
    assert here.kinds() == []


def test_later_child_does_not_use_parents_handlers(app, parent):
    """A child that is forked while the parent's handlers are connected disconnects them."""
    here = parent()

    def run():
        assert not any(handlers._connected for handlers in here.capture._handlers)
        fail_in_parent(app, "shop.add", "t", ValueError("in the child"))

    assert here.child(run) == 0
    (event,) = here.events()
    assert (event["kind"], event["data"]["exception"]) == ("task.failed", "ValueError")
    assert all(handlers._connected for handlers in here.capture._handlers)


def test_children_note_nothing_without_agent(app):
    """Once the worker is ready without an agent, children note nothing."""
    channel = prefork.open()
    assert channel.counters.agent == UNDECIDED
    signals.worker_ready.send(sender=None)
    assert channel.counters.agent == ABSENT

    def run():
        signals.worker_process_init.send(sender="w@h")
        trace(app, "shop.add", "t", (1,))

    assert in_child(run) == 0
    assert channel.reader.read() == []


def test_children_note_before_agent_is_installed(app, parent):
    """What children run before the agent starts is read when it starts."""
    prefork.open()

    def run():
        signals.worker_process_init.send(sender="w@h")
        trace(app, "shop.add", "t", (1,))

    assert in_child(run) == 0
    here = parent()
    signals.worker_ready.send(sender=None)
    assert prefork.channel.counters.agent == PRESENT
    assert here.kinds() == ["task.started", "task.succeeded"]


def test_late_agent_warns_once(app, parent, caplog):
    """An agent that is installed after the worker was ready logs one warning, and then reports."""
    prefork.open()
    signals.worker_ready.send(sender=None)
    here = parent()
    warnings = [record for record in caplog.records if "already running" in record.message]
    assert len(warnings) == 1
    here.runs(("shop.add", "t", 1))
    assert here.kinds() == ["task.started", "task.succeeded"]


def test_stopped_agent_stops_children(app, parent):
    """After the agent's stop the children note nothing."""
    here = parent()
    here.source.disconnect()
    assert prefork.channel.counters.agent == ABSENT
    here.runs(("shop.add", "t", 1))
    assert here.kinds() == []


def test_losses_are_reported(app, parent):
    """Messages that do not fit appear in the source's counter."""
    here = parent()
    runs = [("shop.returns", str(number), 15_000) for number in range(200)]
    here.runs(*runs)
    lost = here.source.lost()
    assert lost > 0
    succeeded = [event for event in here.events() if event["kind"] == "task.succeeded"]
    assert len(succeeded) + lost >= 200


def test_unreadable_note_is_counted(app, parent):
    """A note that cannot be decoded is counted, and the next one is read."""
    here = parent()
    assert here.child(lambda: prefork._child._writer.send(b"garbage")) == 0
    here.runs(("shop.add", "t", 1))
    assert here.kinds() == ["task.started", "task.succeeded"]
    assert here.source.dropped() == 1


@pytest.fixture
def polling(app, backend):
    """A parent whose children keep starts."""
    here = Parent(app, backend, 1)
    yield here
    here.source.disconnect()


def starts(here, task_id):
    """Start a task in a child that then is gone."""
    task = here.app.tasks["shop.add"]
    assert here.child(lambda: signals.task_prerun.send(None, task_id=task_id, task=task)) == 0


def test_long_run_is_started_at_second_reading(app, polling):
    """The start of a run that goes on is reported, once, although its child has not sent it."""
    receive(app, "shop.add", "t")
    starts(polling, "t")
    assert polling.capture.drain()
    assert len(polling.ring) == 1
    assert polling.capture.drain()
    assert not polling.capture.drain()
    started = polling.events()[-1]
    assert started["kind"] == "task.started"
    assert "t" in polling.capture._runs.open


def test_kept_start_precedes_only_later_records_of_parent(app, polling):
    """A start that a child keeps is reported before the arrival of the next run, not after it; the
    start of the next run follows that arrival.
    """
    receive(app, "shop.add", "t")
    starts(polling, "t")
    receive(app, "shop.add", "other")
    request = task_request(app, "shop.add", "t")
    request.request_dict = {"retries": 1}
    signals.task_received.send(sender=None, request=request)
    starts(polling, "t")
    polling.capture.drain()
    events = [json.loads(record[0](record)) for record in polling.ring.take(100)]
    kinds = [event["kind"] for event in events if event["task_id"] == "t"]
    assert kinds == ["task.received", "task.started", "task.received"]
    assert polling.kinds() == ["task.retried", "task.started"]


def test_eager_task_within_run_keeps_order(app, polling):
    """A task that runs another one eagerly is reported with both runs, each with its run time."""

    @app.task(shared=False, name="shop.outer")
    def outer():
        return app.tasks["shop.add"].apply((1,), task_id="inner").result

    polling.runs(("shop.outer", "outer"))
    events = polling.events()
    assert [(event["kind"], event["task_id"]) for event in events] == [
        ("task.started", "outer"),
        ("task.started", "inner"),
        ("task.succeeded", "inner"),
        ("task.succeeded", "outer"),
    ]
    assert all(event["data"]["runtime_ms"] >= 0 for event in events[2:])


def test_unreadable_start_does_not_stop_reader(app, polling):
    """A kept start that cannot be decoded is counted, and a record of the parent is reported."""
    receive(app, "shop.add", "t")
    assert polling.child(lambda: prefork._child._writer.send_start(b"garbage")) == 0
    fail_in_parent(app, "shop.add", "t", WorkerLostError("gone"))
    assert polling.kinds() == ["task.received", "task.failed"]
    assert polling.source.dropped() == 1


def test_loop_lets_idle_children_send_at_once(app, polling, backend):
    """The loop polls while messages arrive. Then it waits, and a start wakes it."""
    counters = prefork.channel.counters
    counters.polling = 0
    (loop,) = [run for name, run in polling.source.loops() if name == PreforkCapture.name]
    stop_event = backend.event()
    task = backend.spawn(loop, stop_event, name="reader")

    def until(condition):
        end = backend.now() + 5
        while not condition() and backend.now() < end:
            backend.sleep(0.01)
        assert condition()

    polling.runs(("shop.add", "a", 1))
    until(lambda: counters.polling)
    starts(polling, "b")  # is kept
    until(lambda: "b" in polling.capture._runs.open)
    until(lambda: not counters.polling)
    began = backend.now()
    starts(polling, "c")  # is sent
    until(lambda: "c" in polling.capture._runs.open)
    assert backend.now() - began < 0.9  # earlier than the next time-out of the wait
    stop_event.set()
    assert task.join(5)
    assert counters.polling == 0


def test_stopping_loop_takes_kept_starts(app, polling, backend):
    """A start that a child keeps at the agent's stop is reported."""
    (loop,) = [run for name, run in polling.source.loops() if name == PreforkCapture.name]
    starts(polling, "t")
    stop_event = backend.event()
    stop_event.set()
    assert backend.spawn(loop, stop_event, name="reader").join(5)
    assert [record[2] for record in polling.ring.take(10)] == ["t"]


def test_reader_loop_reads_and_finishes(app, parent, backend):
    """The loop reads while it runs, and all that is left when it stops."""
    here = parent()
    (loop,) = [run for name, run in here.source.loops() if name == PreforkCapture.name]
    stop_event = backend.event()
    task = backend.spawn(loop, stop_event, name="reader")
    here.runs(("shop.add", "a", 1))
    end = backend.now() + 5
    while len(here.ring) < 2 and backend.now() < end:
        backend.sleep(0.01)
    assert len(here.ring) == 2
    here.runs(("shop.add", "b", 1))
    stop_event.set()
    here.capture.finish()
    assert task.join(5)
    assert [event["task_id"] for event in here.events()] == ["a", "a", "b", "b"]


def test_spawning_worker_names_its_channel(monkeypatch, tmp_path):
    """A worker that spawns makes a channel with names, and removes those of dead workers."""
    monkeypatch.setenv("Z4J_HOME", str(tmp_path))
    dead = tmp_path / "channel-999999999"
    (dead / "pipe").mkdir(parents=True)
    prefork.open(spawn=True)
    directory = tmp_path / f"channel-{os.getpid()}"
    assert os.environ[CHANNEL_VARIABLE] == str(directory)
    assert list(tmp_path.iterdir()) == [directory]
    prefork.close()
    assert list(tmp_path.iterdir()) == []
    assert CHANNEL_VARIABLE not in os.environ


def test_solo_pool_does_not_start_child(app):
    """``worker_process_init`` in the process that made the channel starts no child."""
    prefork.open()
    signals.worker_process_init.send(sender="w@h")
    assert prefork._child is None
    assert prefork_parent.prefork is prefork
