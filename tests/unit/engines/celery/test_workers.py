"""The worker registry in virtual time: enabled events, queues, expiry."""

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.engines.celery import workers as module
from z4j_bare.engines.celery.workers import (
    EXPIRY,
    INTERVAL,
    MAX_NAME_CHARS,
    MAX_WORKERS,
    WorkerRegistry,
)
from z4j_bare.events.presence import Presence


class RegistryHarness:
    """A registry with a fake app, and a task that calls ``tick`` twice a second.

    ``queues`` has the replies to ``active_queues``; ``error`` is raised by every request.
    """

    def __init__(self, **options):
        self.backend = FakeConcurrency()
        self.enabled = []
        self.queues = {}
        self.error = None
        self.announced = []
        presence = Presence(
            "celery",
            lambda record: self.announced.append((record[1], record[-1]["worker"])),
            RedactionEngine().value_matches,
        )
        self.presence = presence
        control = SimpleNamespace(enable_events=self.enable, inspect=self.inspect)
        self.app = SimpleNamespace(
            control=control,
            connection_for_write=lambda connect_timeout: nullcontext("unpooled"),
            tasks={"own": SimpleNamespace(queue="c")},
            conf=SimpleNamespace(task_default_queue="a"),
            amqp=SimpleNamespace(router=SimpleNamespace(lookup_route=self.route)),
        )
        self.registry = WorkerRegistry(self.app, presence, self.backend, **options)
        self.backend.spawn(self.tick, name="tick")

    def tick(self):
        while True:
            self.registry.tick()
            self.backend.sleep(0.5)

    def enable(self, destination, connection):
        assert connection == "unpooled"
        self.enabled.append((self.backend.now(), destination))
        if self.error:
            raise self.error

    def inspect(self, destination, timeout, connection):
        assert connection == "unpooled"
        answers = {
            name: [{"name": queue} for queue in queues] for name, queues in self.queues.items()
        }
        if not answers:
            self.backend.sleep(timeout)
        if self.error:
            raise self.error
        return SimpleNamespace(active_queues=lambda: answers or None)

    def route(self, name, *_arguments):
        if name == "failing":
            raise KeyError("no route")
        return {"routed": {"queue": "b"}, "elsewhere": {"queue": SimpleNamespace(name="z")}}.get(
            name
        )

    def enabled_at(self, hostname):
        return [round(when, 1) for when, destination in self.enabled if destination == [hostname]]


@pytest.fixture
def harness():
    return RegistryHarness()


def test_registry_broadcasts_enable_events(harness):
    """``enable_events`` goes to all workers at the start, after 5 s, and then every minute."""
    harness.backend.advance(2.5 * INTERVAL)
    calls = [when for when, destination in harness.enabled if destination is None]
    assert calls[0] <= 2
    assert 4 <= calls[1] <= 7
    assert [
        INTERVAL - 2 <= later - earlier <= INTERVAL + 2 for earlier, later in pairwise(calls[1:])
    ] == [True, True]


def test_new_worker_is_announced_and_enabled_three_times(harness):
    """A worker that does not listen yet gets ``enable_events`` again 1 s and 5 s later; it is
    announced once.
    """
    harness.backend.advance(20)
    started_at = harness.backend.now()
    assert [harness.registry.touch("w@web.example.com") for _ in range(3)] == [
        "w@web_example_com"
    ] * 3
    harness.backend.advance(20)
    first, second, third = (when - started_at for when in harness.enabled_at("w@web.example.com"))
    assert first <= 2 < second + 1 <= 5 < third + 1 <= 9
    assert harness.announced == [("worker.online", "w@web_example_com")]


def test_worker_online_keeps_known_queues(harness):
    """Enabling events makes a worker send ``worker-online``, so its reported queues stay valid."""
    harness.queues = {"w@h": ["q"]}
    harness.registry.touch("w@h")
    harness.backend.advance(20)
    harness.registry.online("w@h")
    assert harness.registry.queue_of("w@h", "t") == "q"


def test_reply_ends_repeated_enable_events(harness):
    """A worker that reported its queues gets one ``enable_events`` until it starts again."""
    harness.queues = {"w@h": ["q"]}
    harness.backend.advance(20)
    before = len(harness.enabled)
    harness.registry.online("w@h")
    harness.backend.advance(20)
    assert len(harness.enabled_at("w@h")) == 1
    assert len(harness.enabled) == before + 1
    assert harness.announced == [("worker.online", "w@h")]


def test_queue_of_uses_only_queue_or_route(harness):
    """The queue is the only one of the worker, or the task's route if the worker consumes it."""
    harness.queues = {"one@h": ["q"], "more@h": ["a", "b", "c"], "none@h": []}
    harness.backend.advance(3)
    queue_of = harness.registry.queue_of
    assert (
        queue_of("one@h", "routed"),
        queue_of("none@h", "routed"),
        queue_of("new@h", "routed"),
    ) == ("q", None, None)
    queues = {
        task: queue_of("more@h", task)
        for task in ("routed", "plain", "own", "elsewhere", "failing")
    }
    assert queues == {"routed": "b", "plain": "a", "own": "c", "elsewhere": None, "failing": None}


def test_silent_worker_expires(harness):
    """A worker that is silent for minutes is no longer announced as alive."""
    harness.registry.touch("w@h")
    harness.backend.advance(EXPIRY / 2)
    assert list(harness.presence.workers) == ["w@h"]
    harness.backend.advance(EXPIRY + INTERVAL)
    assert list(harness.presence.workers) == []
    assert harness.announced == [("worker.online", "w@h")]


def test_worker_that_expires_while_due_gets_no_request(harness):
    """After a pause of minutes, in which nothing was called, a due worker expires without error."""
    harness.registry.touch("w@h")
    harness.backend._clock += EXPIRY + INTERVAL
    harness.registry.tick()
    assert list(harness.presence.workers) == []


def test_worker_offline_is_announced_once(harness):
    """An offline worker is announced once, and its return is announced again."""
    harness.registry.touch("w@h")
    for _ in range(2):
        harness.registry.offline("w@h")
    harness.registry.touch("w@h")
    assert [kind for kind, _ in harness.announced] == [
        "worker.online",
        "worker.offline",
        "worker.online",
    ]


def test_only_hostname_limits_registry():
    """Other workers than the one to report are ignored and not called; it does not expire."""
    harness = RegistryHarness(only_hostname="w@h")
    assert (harness.registry.touch("w@h"), harness.registry.touch("w@other")) == ("w@h", None)
    harness.queues = {"w@other": ["q"]}
    harness.backend.advance(EXPIRY + 2 * INTERVAL)
    assert {tuple(destination) for _, destination in harness.enabled} == {("w@h",)}
    assert list(harness.presence.workers) == ["w@h"]


def test_registry_continues_after_broker_failure(harness):
    """A failed request does not stop the broadcast, and both are repeated."""
    harness.error = OSError("broker is down")
    harness.backend.advance(8)
    assert len(harness.enabled) == 2
    harness.error, harness.queues = None, {"w@h": ["q"]}
    harness.backend.advance(INTERVAL + 5)
    assert harness.registry.queue_of("w@h", "plain") == "q"


def test_registry_bounds_workers_and_names(harness, monkeypatch):
    """Above the maximum the longest silent worker is removed, and too long names are rejected."""
    monkeypatch.setattr(module, "MAX_WORKERS", 3)
    assert MAX_WORKERS >= 1000
    for number in range(5):
        harness.registry.touch(f"w{number}@h")
        harness.backend.advance(1)
    assert list(harness.presence.workers) == ["w2@h", "w3@h", "w4@h"]
    for name in ("", "w" * (MAX_NAME_CHARS + 1)):
        with pytest.raises(ValueError, match="worker name"):
            harness.registry.touch(name)
