"""The event receiver on kombu's memory transport, and with a fake broker in virtual time."""

import logging
from types import SimpleNamespace

import pytest
from kombu import Producer
from kombu.utils import eventio

from tests.support.celery_fakes import FakeBroker, memory_app
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.concurrency.timeslice import SLICE_SECONDS
from z4j_bare.engines.celery.event_receiver import (
    BACKOFF_MAX,
    DRAIN_MAX,
    POLL_TIMEOUT,
    SILENCE_TIMEOUT,
    EventReceiver,
)
from z4j_bare.errors import ForkedChildError


@pytest.fixture
def app():
    app = memory_app()
    yield app
    app.close()


class RunningReceiver:
    """A receiver in a task, the events it delivered, and an event dispatcher like a worker's."""

    def __init__(self, app, backend):
        self.backend = backend
        self.events = []
        self.ticks = 0
        self.stop_event = backend.event()
        self.connection = app.connection_for_write()
        self.dispatcher = app.events.Dispatcher(
            self.connection, hostname="w@h", buffer_group=["task"], buffer_limit=100
        )
        self.exchange = app.events.Receiver(self.connection).exchange
        self.receiver = EventReceiver(app, self.on_event, self.on_tick, backend)
        self.task = backend.spawn(self.receiver.run, self.stop_event, name="receiver")

    def on_event(self, event):
        if event.get("uuid") == "garbage":
            raise LookupError
        self.events.append((event["type"], event.get("uuid")))

    def on_tick(self):
        self.ticks += 1

    def send(self, what, **fields):
        self.dispatcher.send(what, **fields)
        self.dispatcher.flush()

    def end(self):
        self.stop_event.set()
        self.receiver.finish()
        ended = self.task.join(5)
        self.connection.release()
        return ended


@pytest.fixture
def running(app, backend, until):
    """A receiver that has subscribed; an event sent before that would be lost."""
    running = RunningReceiver(app, backend)
    until(lambda: running.send("worker-heartbeat") or running.events)
    yield running
    running.end()


def test_receiver_delivers_events_in_order(running, until):
    """Events arrive in order, one or many in a message, and ``on_tick`` is called."""
    for number in range(5):
        running.dispatcher.send("task-received", uuid=str(number))
    running.dispatcher.flush()
    running.send("task-started", uuid="5")
    until(lambda: ("task-started", "5") in running.events)
    assert [uuid for _, uuid in running.events if uuid] == ["0", "1", "2", "3", "4", "5"]
    assert running.ticks


def test_receiver_counts_malformed_events_and_continues(running, until):
    """Malformed events and undecodable messages are counted and do not end the receiver."""
    running.dispatcher.send("task-received", uuid="garbage")
    running.send("task-received", uuid="good")
    with Producer(running.connection, exchange=running.exchange) as producer:
        producer.publish([None, "text", 5], routing_key="task.multi", serializer="json")
        producer.publish(
            b"{",
            routing_key="task.multi",
            content_type="application/json",
            content_encoding="utf-8",
        )
        producer.publish(
            b"x",
            routing_key="task.multi",
            content_type="application/x-python-serialize",
            content_encoding="binary",
        )
    running.send("task-received", uuid="last")
    until(lambda: ("task-received", "last") in running.events)
    assert ("task-received", "good") in running.events
    assert (running.receiver.unreadable, running.receiver.failures) == (6, 0)
    assert running.task.alive()


def test_receiver_drains_before_stopping(running):
    """After the stop event everything already sent is read, and ``finish`` waits for that."""
    for number in range(200):
        running.dispatcher.send("task-received", uuid=str(number))
    running.dispatcher.flush()
    assert running.end()
    assert len([uuid for _, uuid in running.events if uuid]) == 200


def test_receiver_yields_during_burst(running, backend, until):
    """Twenty messages of ten slow events each are not one step of 200 ms: other tasks run in
    between.
    """
    turns = []
    on_event = running.receiver._on_event

    def slow(event):
        deadline = backend.now() + 0.001
        while backend.now() < deadline:
            pass
        on_event(event)

    def other_task():
        while not running.stop_event.is_set():
            turns.append(len(running.events))
            backend.sleep(0.001)

    running.receiver._on_event = slow
    backend.spawn(other_task, name="other")
    for number in range(20):
        for each in range(10):
            running.dispatcher.send("task-received", uuid=f"{number}-{each}")
        running.dispatcher.flush()
    before = len(running.events)
    until(lambda: len(running.events) >= before + 200)
    assert len({turn for turn in turns if before < turn < before + 200}) >= 3


def test_finish_returns_without_run(app, backend):
    """A receiver that never ran has nothing to wait for."""
    EventReceiver(app, print, print, backend).finish()


@pytest.fixture
def harness():
    backend = FakeConcurrency()
    app = FakeBroker(backend)
    harness = SimpleNamespace(backend=backend, app=app, stop_event=backend.event(), events=[])
    harness.receiver = EventReceiver(app, harness.events.append, lambda: None, backend)
    harness.task = backend.spawn(harness.receiver.run, harness.stop_event, name="receiver")
    yield harness
    harness.stop_event.set()
    harness.backend.advance(60)


def test_receiver_backs_off_while_broker_is_down(harness, caplog):
    """Each failure is counted, only the first is logged, and the interval grows."""
    harness.app.error = OSError("redis://:password@host is down")
    with caplog.at_level(logging.INFO, "z4j"):
        harness.backend.advance(120)
    assert harness.receiver.failures == len(harness.app.attempts) <= 15
    assert harness.app.attempts[1] <= 1
    assert harness.app.attempts[-1] - harness.app.attempts[-2] >= BACKOFF_MAX
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "password" not in caplog.text
    harness.app.error = None
    harness.backend.advance(60)
    attempts = len(harness.app.attempts)
    harness.backend.advance(SILENCE_TIMEOUT * 2)
    assert len(harness.app.attempts) == attempts
    assert harness.app.released == attempts - 1


def test_receiver_reconnects_soon_after_stable_connection(harness):
    """After a stable connection breaks, the next attempt follows within a second."""
    harness.backend.advance(300)

    def broken():
        harness.app.drain = lambda: None
        raise ConnectionError

    harness.app.drain = broken
    harness.backend.advance(POLL_TIMEOUT + 1.1)
    assert (len(harness.app.attempts), harness.receiver.failures) == (2, 1)


def test_receiver_treats_network_timeout_as_failure(harness):
    """ETIMEDOUT is a ``TimeoutError`` too, and must not be taken for a broker without events."""

    def dead():
        harness.app.drain = lambda: None
        raise TimeoutError(110, "Connection timed out")

    harness.app.drain = dead
    harness.backend.advance(3)
    assert harness.receiver.failures == 1


def test_receiver_reconnects_after_silence(harness):
    """A connection that delivered events is renewed after a long silence; one that never did is
    kept.
    """
    harness.backend.advance(3 * SILENCE_TIMEOUT)
    assert len(harness.app.attempts) == 1
    harness.app.callback({"type": "worker-heartbeat"}, None)
    harness.backend.advance(SILENCE_TIMEOUT + 5)
    assert (len(harness.app.attempts), harness.receiver.failures) == (2, 0)


def test_receiver_does_not_spin_on_empty_drain(harness):
    """A transport that keeps returning without a message does not keep the hub busy."""
    turns = []

    def return_immediately(timeout):
        turns.append(harness.backend.now())

    harness.app.drain_events = return_immediately
    harness.backend.advance(1)
    assert len(turns) <= 1 / SLICE_SECONDS + 2


def test_receiver_drain_is_bounded(harness):
    """A broker that keeps sending events does not delay the agent's stop."""
    harness.backend.advance(1)
    harness.app.drain_events = lambda timeout: (
        harness.app.callback({}, None) or harness.backend.sleep(0.01)
    )
    harness.stop_event.set()
    started_at = harness.backend.now()
    harness.receiver.finish()
    assert harness.backend.now() - started_at <= POLL_TIMEOUT + DRAIN_MAX + 0.1
    harness.backend.advance(1)
    assert not harness.task.alive()


def test_receiver_keeps_connection_open_in_forked_child(harness, monkeypatch):
    """In a forked child the receiver ends without a release, which would cancel the parent's
    subscription.
    """
    harness.backend.advance(1)
    monkeypatch.setattr(type(harness.backend), "forked", lambda _backend: True)

    def in_child():
        raise ForkedChildError

    harness.app.drain = in_child
    harness.backend.advance(2)
    assert harness.app.released == 0
    assert not harness.receiver._finished.is_set()
    assert harness.receiver.failures == 0


def test_receiver_is_inert_when_patched_after_kombu(backend, mode, until, monkeypatch, caplog):
    """If kombu was imported before the patching, the broker is not read and a warning says why."""
    attempts = []
    app = SimpleNamespace(connection_for_read=lambda **_: attempts.append(1))
    monkeypatch.setattr(eventio, "_selectf", lambda: None)
    stop_event = backend.event()
    task = backend.spawn(EventReceiver(app, None, None, backend).run, stop_event, name="late")
    until(lambda: attempts or "imported kombu before it was patched" in caplog.text)
    stop_event.set()
    assert task.join(10)
    assert bool(attempts) == (mode == "threads")
