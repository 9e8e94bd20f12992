"""Celery's health, asked of its broker and read from its worker."""

import json
from types import SimpleNamespace

import pytest

celery = pytest.importorskip("celery")

from celery.worker import state  # noqa: E402

from z4j_bare.engines.celery import worker_health as worker  # noqa: E402
from z4j_bare.engines.celery.broker_health import BrokerProbe  # noqa: E402
from z4j_bare.engines.celery.worker_health import WorkerDetails, local_details, remote_details  # noqa: E402
from z4j_bare.monitoring import health as probes  # noqa: E402


class Request:
    """A running task, as far as Celery's own ``Request.info`` is asked."""

    def info(self, safe):
        return {"id": "1", "name": "t.pays", "args": "('4111',)", "kwargs": "{}", "safe": safe}


class Hasty(set):
    """A set that another thread changes during the first looks."""

    looks = 2

    def __iter__(self):
        if self.looks:
            self.looks -= 1
            raise RuntimeError("Set changed size during iteration")
        return super().__iter__()


@pytest.fixture
def app():
    made = celery.Celery("z4j-health", broker="memory://", set_as_current=False)

    @made.task(name="t.pays", shared=False)
    def pays():
        return None

    made.conf.worker_prefetch_multiplier = 7
    yield made
    made.close()


@pytest.fixture
def consumer(app):
    queue = app.amqp.queues["celery"]
    controller = SimpleNamespace(stats=lambda: {"pid": 7, "pool": {"max-concurrency": 3}})
    return SimpleNamespace(
        app=app,
        hostname="w@web-1.example.com",
        controller=controller,
        task_consumer=SimpleNamespace(queues=[queue]),
    )


def test_a_worker_tells_of_itself_without_being_asked(app, consumer, monkeypatch):
    """Statistics, queues, tasks, settings and running tasks are there, and no remote control is used for them."""
    monkeypatch.setattr(app, "control", None)
    monkeypatch.setattr(state, "active_requests", [Request()])
    facts = local_details(consumer)["w@web-1.example.com"]
    assert facts["stats"]["pool"] == {"max-concurrency": 3}
    assert [queue["name"] for queue in facts["active_queues"]] == ["celery"]
    assert facts["registered"] == ["t.pays"]
    assert facts["conf"]["worker_prefetch_multiplier"] == 7
    assert "broker_url" not in facts["conf"]


def test_running_tasks_come_without_arguments(consumer, monkeypatch):
    """The brain keeps worker details as they are, so nothing that a redaction would look at is in them."""
    monkeypatch.setattr(state, "active_requests", [Request()])
    assert local_details(consumer)["w@web-1.example.com"]["active"] == [
        {"id": "1", "name": "t.pays", "safe": True}
    ]


def test_a_set_that_changes_is_looked_at_again(consumer, monkeypatch):
    """The worker's own thread adds and removes running tasks while ours reads; a set that never rests is left out."""
    hasty = Hasty([Request()])
    monkeypatch.setattr(state, "active_requests", hasty)
    assert len(local_details(consumer)["w@web-1.example.com"]["active"]) == 1
    hasty.looks = 3
    assert "active" not in local_details(consumer)["w@web-1.example.com"]


def test_a_worker_that_reconnects_has_no_queues(consumer, monkeypatch):
    """Between two connections to the broker there is no task consumer, and the rest is told all the same."""
    consumer.task_consumer = None
    assert "active_queues" not in local_details(consumer)["w@web-1.example.com"]


def test_workers_elsewhere_are_asked_over_a_connection_of_our_own(app, monkeypatch):
    """A forked child closes the app's pool and would read our answer from it: nobody waits for one in there."""
    used = []

    class Inspect:
        def __init__(self, timeout, connection):
            connection.connect()
            used.append((connection, connection in app.pool._dirty))

        def stats(self):
            return {"w@there": {"pid": 1}}

    monkeypatch.setattr(app.control, "inspect", Inspect)
    assert remote_details(app) == {"w@there": {"stats": {"pid": 1}}}
    ((connection, pooled),) = used
    assert not pooled
    assert not connection.connected


def test_workers_elsewhere_may_all_be_silent(app, monkeypatch):
    """Nobody answers: there are no details, and no error."""
    monkeypatch.setattr(worker, "REPLY_TIMEOUT", 0.01)
    assert remote_details(app) == {}


def test_details_are_renewed_every_minute(app, consumer):
    """The answer is kept for a minute; a name that the brain would redact is rewritten."""
    now, looks = [100.0], []
    consumer.controller.stats = lambda: looks.append(1) or {}
    details = WorkerDetails(app, consumer, lambda name: "@" in name, clock=lambda: now[0])
    assert list(json.loads(details())) == ["w@web-1_example_com"]
    now[0] += worker.DETAILS_TTL - 1
    details()
    assert len(looks) == 1
    now[0] += 1
    details()
    assert len(looks) == 2


def test_a_broker_that_answers_is_connected(app):
    """The probe names the broker's kind, and the depth of each queue it is asked for."""
    probe = BrokerProbe("celery", app, lambda: ["idle"])
    try:
        answer = probe()
        assert (answer["celery.broker_connected"], answer["celery.broker_type"]) == (
            "True",
            "memory",
        )
        assert json.loads(answer["celery.queue_depths"]) == {"idle": 0}
    finally:
        probe.close()


def test_a_channel_is_kept_while_it_is_good(app):
    """Probes share one channel; a kept one that is out of date costs another try, not a false alarm."""
    probe = BrokerProbe("celery", app, lambda: ["one", "two"])
    try:
        probe()
        kept = probe._channel
        assert probe()["celery.broker_connected"] == "True"
        assert probe._channel is kept

        def stale(**_options):
            raise ConnectionResetError

        kept.queue_declare = stale
        assert probe()["celery.broker_connected"] == "True"
        assert probe._channel not in (None, kept)
    finally:
        probe.close()


def test_a_broker_that_is_away_is_not(app):
    """A refused connection is an answer too, without the broker's address in it."""
    app.conf.broker_url = "redis://:secret@127.0.0.1:1/0"
    answer = BrokerProbe("celery", app, lambda: ["celery"])()
    assert answer["celery.broker_connected"] == "False"
    assert "secret" not in str(answer)


def test_a_question_is_not_asked_twice_at_a_time(bridge, backend, monkeypatch, until):
    """While an answer is outstanding the check fails, and the late answer is the next one."""
    monkeypatch.setattr(probes, "PATIENCE", 0.05)
    go, asked = backend.event(), []

    def question():
        asked.append(1)
        go.wait()
        return {"x": str(len(asked))}

    ask = probes.CachedProbe(bridge, question, lambda error: {"failed": type(error).__name__})
    assert ask() == {"failed": "TimeoutError"}
    assert ask() == {"failed": "TimeoutError"}
    assert len(asked) == 1
    go.set()
    until(lambda: ask().get("x"))


def test_a_question_that_fails_says_so(bridge):
    """An error becomes the answer that the caller has for it."""
    ask = probes.CachedProbe(bridge, lambda: 1 / 0, lambda error: {"failed": type(error).__name__})
    assert ask() == {"failed": "ZeroDivisionError"}
