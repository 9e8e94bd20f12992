"""Who is there: greeted in time, asked for their queues, forgotten when they are silent. In virtual time."""

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


class World:
    """A roster, an app whose workers answer as told, and a loop that tends it twice a second."""

    def __init__(self, **whose):
        self.backend = FakeConcurrency()
        self.enabled = []
        self.queues = {}
        self.fails = None
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
            connection_for_write=lambda connect_timeout: nullcontext("of no pool"),
            tasks={"own": SimpleNamespace(queue="c")},
            conf=SimpleNamespace(task_default_queue="a"),
            amqp=SimpleNamespace(router=SimpleNamespace(lookup_route=self.route)),
        )
        self.roster = WorkerRegistry(self.app, presence, self.backend, **whose)
        self.backend.spawn(self.tick, name="tick")

    def tick(self):
        while True:
            self.roster.tick()
            self.backend.sleep(0.5)

    def enable(self, destination, connection):
        assert connection == "of no pool"
        self.enabled.append((self.backend.now(), destination))
        if self.fails:
            raise self.fails

    def inspect(self, destination, timeout, connection):
        assert connection == "of no pool"
        answers = {
            name: [{"name": queue} for queue in queues] for name, queues in self.queues.items()
        }
        if not answers:
            self.backend.sleep(timeout)
        if self.fails:
            raise self.fails
        return SimpleNamespace(active_queues=lambda: answers or None)

    def route(self, name, *_arguments):
        if name == "odd":
            raise KeyError("a router of the host's")
        return {"routed": {"queue": "b"}, "elsewhere": {"queue": SimpleNamespace(name="z")}}.get(
            name
        )

    def greetings(self, hostname):
        return [round(when, 1) for when, destination in self.enabled if destination == [hostname]]


@pytest.fixture
def world():
    return World()


def test_all_workers_are_called(world):
    """``enable_events`` goes to everyone within a second or two of the start, at 5 s, and every minute after that."""
    world.backend.advance(2.5 * INTERVAL)
    calls = [when for when, destination in world.enabled if destination is None]
    assert calls[0] <= 2
    assert 4 <= calls[1] <= 7
    assert [
        INTERVAL - 2 <= later - earlier <= INTERVAL + 2 for earlier, later in pairwise(calls[1:])
    ] == [True, True]


def test_a_new_worker_is_announced_and_greeted_at_once(world):
    """One that does not listen yet gets ``enable_events`` again 1 s and 5 s later, and it is announced once."""
    world.backend.advance(20)
    began = world.backend.now()
    assert [world.roster.touch("w@web.example.com") for _ in range(3)] == ["w@web_example_com"] * 3
    world.backend.advance(20)
    first, second, third = (when - began for when in world.greetings("w@web.example.com"))
    assert first <= 2 < second + 1 <= 5 < third + 1 <= 9
    assert world.announced == [("worker.online", "w@web_example_com")]


def test_a_worker_that_is_made_to_send_events_keeps_its_queues(world):
    """Its word for that is the one for its start: what it does meanwhile still has the queue that it told."""
    world.queues = {"w@h": ["q"]}
    world.roster.touch("w@h")
    world.backend.advance(20)
    world.roster.online("w@h")
    assert world.roster.queue_of("w@h", "t") == "q"


def test_an_answer_ends_the_greeting(world):
    """A worker that told its queues has heard us: one greeting is enough, until it starts again."""
    world.queues = {"w@h": ["q"]}
    world.backend.advance(20)
    before = len(world.enabled)
    world.roster.online("w@h")
    world.backend.advance(20)
    assert len(world.greetings("w@h")) == 1
    assert len(world.enabled) == before + 1
    assert world.announced == [("worker.online", "w@h")]


def test_the_queue_is_known_where_it_can_be(world):
    """One queue is the one; of several it is where the app sends the task, if its worker consumes that; else nobody knows."""
    world.queues = {"one@h": ["q"], "more@h": ["a", "b", "c"], "none@h": []}
    world.backend.advance(3)
    queue_of = world.roster.queue_of
    assert (
        queue_of("one@h", "routed"),
        queue_of("none@h", "routed"),
        queue_of("new@h", "routed"),
    ) == ("q", None, None)
    told = {
        task: queue_of("more@h", task) for task in ("routed", "plain", "own", "elsewhere", "odd")
    }
    assert told == {"routed": "b", "plain": "a", "own": "c", "elsewhere": None, "odd": None}


def test_a_silent_worker_is_forgotten(world):
    """One that says nothing for minutes is announced no longer, so that the brain does not take it for alive."""
    world.roster.touch("w@h")
    world.backend.advance(EXPIRY / 2)
    assert list(world.presence.workers) == ["w@h"]
    world.backend.advance(EXPIRY + INTERVAL)
    assert list(world.presence.workers) == []
    assert world.announced == [("worker.online", "w@h")]


def test_a_worker_that_leaves_is_told(world):
    """A goodbye is passed on, once, and a return is news."""
    world.roster.touch("w@h")
    for _ in range(2):
        world.roster.offline("w@h")
    world.roster.touch("w@h")
    assert [kind for kind, _ in world.announced] == [
        "worker.online",
        "worker.offline",
        "worker.online",
    ]


def test_one_worker_only():
    """With one worker to report, others are not, it alone is called, and silence does not make it vanish."""
    world = World(only_hostname="w@h")
    assert (world.roster.touch("w@h"), world.roster.touch("w@other")) == ("w@h", None)
    world.queues = {"w@other": ["q"]}
    world.backend.advance(EXPIRY + 2 * INTERVAL)
    assert {tuple(destination) for _, destination in world.enabled} == {("w@h",)}
    assert list(world.presence.workers) == ["w@h"]


def test_our_own_worker_is_greeted_but_not_asked():
    """In a worker ``enable_events`` goes to itself, three times within some seconds and never again."""
    world = World(own_hostname="w@h")
    world.queues = {"w@h": ["q"]}
    world.roster.touch("w@h")
    world.backend.advance(10 * INTERVAL)
    assert [destination for _, destination in world.enabled] == [["w@h"]] * 3
    assert world.enabled[-1][0] <= 8
    assert world.roster.queue_of("w@h", "plain") is None
    world.roster.offline("w@h")
    assert world.announced == [("worker.online", "w@h")]


def test_a_broker_that_fails_is_survived(world):
    """Neither the question nor the broadcast may fail for good, nor the one keep the other from being tried."""
    world.fails = OSError("broker away")
    world.backend.advance(8)
    assert len(world.enabled) == 2
    world.fails, world.queues = None, {"w@h": ["q"]}
    world.backend.advance(INTERVAL + 5)
    assert world.roster.queue_of("w@h", "plain") == "q"


def test_names_are_bounded(world, monkeypatch):
    """Not more than so many workers are kept, the longest silent going first, and no name longer than the brain's column."""
    monkeypatch.setattr(module, "MAX_WORKERS", 3)
    assert MAX_WORKERS >= 1000
    for number in range(5):
        world.roster.touch(f"w{number}@h")
        world.backend.advance(1)
    assert list(world.presence.workers) == ["w2@h", "w3@h", "w4@h"]
    for name in ("", "w" * (MAX_NAME_CHARS + 1)):
        with pytest.raises(ValueError, match="worker name"):
            world.roster.touch(name)
