"""The stream of events: over kombu's memory transport on the real backend, and over a broken broker in virtual time."""

import logging
from types import SimpleNamespace

import pytest
from celery import Celery
from kombu import Producer
from kombu.utils import eventio

from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.engines.celery import event_receiver as broker
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
    found = Celery("shop", broker="memory://", set_as_current=False)
    yield found
    found.close()


class Running:
    """A stream in a task, what it took, and a dispatcher such as a worker's."""

    def __init__(self, app, backend):
        self.backend = backend
        self.taken = []
        self.tended = 0
        self.stop_event = backend.event()
        self.connection = app.connection_for_write()
        self.dispatcher = app.events.Dispatcher(
            self.connection, hostname="w@h", buffer_group=["task"], buffer_limit=100
        )
        self.exchange = app.events.Receiver(self.connection).exchange
        self.stream = EventReceiver(app, self.take, self.tend, backend)
        self.task = backend.spawn(self.stream.run, self.stop_event, name="stream")

    def take(self, event):
        if event.get("uuid") == "garbage":
            raise LookupError
        self.taken.append((event["type"], event.get("uuid")))

    def tend(self):
        self.tended += 1

    def send(self, what, **fields):
        self.dispatcher.send(what, **fields)
        self.dispatcher.flush()

    def end(self):
        self.stop_event.set()
        self.stream.finish()
        ended = self.task.join(5)
        self.connection.release()
        return ended


@pytest.fixture
def running(app, backend, until):
    """The stream, once it listens: what is sent before that is nobody's."""
    found = Running(app, backend)
    until(lambda: found.send("worker-heartbeat") or found.taken)
    yield found
    found.end()


def test_events_come_in_order(running, until):
    """Events arrive as they were sent, one by one or many in a message, and what is due is tended to."""
    for number in range(5):
        running.dispatcher.send("task-received", uuid=str(number))
    running.dispatcher.flush()
    running.send("task-started", uuid="5")
    until(lambda: ("task-started", "5") in running.taken)
    assert [uuid for _, uuid in running.taken if uuid] == ["0", "1", "2", "3", "4", "5"]
    assert running.tended


def test_garbage_is_counted_and_the_stream_goes_on(running, until):
    """Neither an event that cannot be taken, nor one that is none, nor a message that cannot be decoded ends the stream."""
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
    until(lambda: ("task-received", "last") in running.taken)
    assert ("task-received", "good") in running.taken
    assert (running.stream.unreadable, running.stream.failures) == (6, 0)
    assert running.task.alive()


def test_what_was_sent_before_the_end_is_read(running):
    """Told to stop, it first reads what is there, and ``finish`` returns when that is done."""
    for number in range(200):
        running.dispatcher.send("task-received", uuid=str(number))
    running.dispatcher.flush()
    assert running.end()
    assert len([uuid for _, uuid in running.taken if uuid]) == 200


def test_a_burst_lets_others_run(running, backend, until):
    """Twenty messages in one go, of ten slow events each, are no step of 200 ms: others get their turn in between."""
    turns = []
    take = running.stream._on_event

    def slow(event):
        deadline = backend.now() + 0.001
        while backend.now() < deadline:
            pass
        take(event)

    def beside():
        while not running.stop_event.is_set():
            turns.append(len(running.taken))
            backend.sleep(0.001)

    running.stream._on_event = slow
    backend.spawn(beside, name="beside")
    for number in range(20):
        for each in range(10):
            running.dispatcher.send("task-received", uuid=f"{number}-{each}")
        running.dispatcher.flush()
    before = len(running.taken)
    until(lambda: len(running.taken) >= before + 200)
    assert len({turn for turn in turns if before < turn < before + 200}) >= 3


def test_finish_before_the_start_returns(app, backend):
    """A stream that never ran has nothing to wait for."""
    EventReceiver(app, print, print, backend).finish()


class Broken:
    """An app whose broker does as it is told, with the times of each attempt."""

    def __init__(self, backend):
        self.backend = backend
        self.attempts = []
        self.released = 0
        self.error = None
        self.drain = lambda: self.backend.sleep(POLL_TIMEOUT)
        self.events = SimpleNamespace(
            Receiver=lambda _connection: SimpleNamespace(queue=None, accept=None)
        )

    def connection_for_read(self, **_options):
        self.attempts.append(self.backend.now())
        return self

    def connect(self):
        if self.error:
            raise self.error

    def Consumer(self, callbacks, **_options):
        self.callback = callbacks[0]
        return SimpleNamespace(consume=lambda: None)

    def drain_events(self, timeout):
        self.drain()
        self.backend.sleep(timeout)
        raise TimeoutError("timed out")

    def heartbeat_check(self):
        pass

    def release(self):
        self.released += 1
        raise OSError("gone already")


@pytest.fixture
def world():
    backend = FakeConcurrency()
    app = Broken(backend)
    found = SimpleNamespace(backend=backend, app=app, stop_event=backend.event(), taken=[])
    found.stream = EventReceiver(app, found.taken.append, lambda: None, backend)
    found.task = backend.spawn(found.stream.run, found.stop_event, name="stream")
    yield found
    found.stop_event.set()
    found.backend.advance(60)


def test_a_broker_that_is_away_is_tried_ever_more_rarely(world, caplog):
    """Every failure is counted, one is logged, without the address in its text, and no error reaches anybody."""
    world.app.error = OSError("redis://:password@host is away")
    with caplog.at_level(logging.INFO, "z4j"):
        world.backend.advance(120)
    assert world.stream.failures == len(world.app.attempts) <= 15
    assert world.app.attempts[1] <= 1
    assert world.app.attempts[-1] - world.app.attempts[-2] >= BACKOFF_MAX
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "password" not in caplog.text
    world.app.error = None
    world.backend.advance(60)
    attempts = len(world.app.attempts)
    world.backend.advance(SILENCE_TIMEOUT * 2)
    assert len(world.app.attempts) == attempts
    assert world.app.released == attempts - 1


def test_a_line_that_breaks_is_renewed_soon(world):
    """After a good connection the next one comes within a second."""
    world.backend.advance(300)

    def broken():
        world.app.drain = lambda: None
        raise ConnectionError

    world.app.drain = broken
    world.backend.advance(POLL_TIMEOUT + 1.1)
    assert (len(world.app.attempts), world.stream.failures) == (2, 1)


def test_the_network_s_own_time_out_is_a_failure(world):
    """ETIMEDOUT is a ``TimeoutError`` too, and must not be taken for a quiet broker."""

    def dead():
        world.app.drain = lambda: None
        raise TimeoutError(110, "Connection timed out")

    world.app.drain = dead
    world.backend.advance(3)
    assert world.stream.failures == 1


def test_a_line_that_fell_silent_is_renewed(world):
    """Workers beat every two seconds; after a long silence the line is presumed dead. One that never spoke is left alone."""
    world.backend.advance(3 * SILENCE_TIMEOUT)
    assert len(world.app.attempts) == 1
    world.app.callback({"type": "worker-heartbeat"}, None)
    world.backend.advance(SILENCE_TIMEOUT + 5)
    assert (len(world.app.attempts), world.stream.failures) == (2, 0)


def test_a_transport_that_returns_at_once_does_not_spin(world):
    """A transport that comes back without a message each time leaves the hub to others."""
    turns = []

    def at_once(timeout):
        turns.append(world.backend.now())

    world.app.drain_events = at_once
    world.backend.advance(1)
    assert len(turns) <= 1 / broker.SLICE_SECONDS + 2


def test_the_end_is_bounded(world):
    """A broker that never falls silent does not keep the agent from stopping."""
    world.backend.advance(1)
    world.app.drain_events = lambda timeout: (
        world.app.callback({}, None) or world.backend.sleep(0.01)
    )
    world.stop_event.set()
    began = world.backend.now()
    world.stream.finish()
    assert world.backend.now() - began <= POLL_TIMEOUT + DRAIN_MAX + 0.1
    world.backend.advance(1)
    assert not world.task.alive()


def test_a_child_leaves_the_parent_s_connection_alone(world, monkeypatch):
    """In a forked child the copy ends without closing anything: that would cancel the parent's subscription."""
    world.backend.advance(1)
    monkeypatch.setattr(type(world.backend), "forked", lambda _backend: True)

    def in_child():
        raise ForkedChildError

    world.app.drain = in_child
    world.backend.advance(2)
    assert world.app.released == 0
    assert not world.stream._finished.is_set()
    assert world.stream.failures == 0


def test_a_process_that_was_patched_too_late(backend, mode, until, monkeypatch, caplog):
    """Where kombu was imported before the patching, its wait would hold up the hub: the broker is left alone and a warning says why."""
    asked = []
    app = SimpleNamespace(connection_for_read=lambda **_: asked.append(1))
    monkeypatch.setattr(eventio, "_selectf", lambda: None)
    stop_event = backend.event()
    task = backend.spawn(EventReceiver(app, None, None, backend).run, stop_event, name="late")
    until(lambda: asked or "imported kombu before it was patched" in caplog.text)
    stop_event.set()
    assert task.join(10)
    assert bool(asked) == (mode == "threads")
