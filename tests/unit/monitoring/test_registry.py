"""The task registry: discovered, compared, told."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from z4j_core.models import DiscoveryHints, TaskDefinition
from z4j_core.transport.frames import parse_frame

from z4j_bare import watcher
from z4j_bare.engines.discovery import discover, strip_defaults
from z4j_bare.engines.host import EngineHost
from z4j_bare.errors import FrameTooLargeError, NetworkError
from z4j_bare.monitoring.registry import RegistryLoop


class Engine:
    """Knows what it is told to."""

    name = "stub"

    def __init__(self, *names):
        self.tasks = dict.fromkeys(names)
        self.hints = []
        self.fail = False

    def capabilities(self):
        return set()

    async def discover_tasks(self, hints=None):
        self.hints.append(hints)
        if self.fail:
            raise ConnectionError("no broker")
        return [
            TaskDefinition(name=name, engine="stub", queue=queue)
            for name, queue in self.tasks.items()
        ]


class Session:
    """Keeps what is sent, and refuses what is larger than it takes."""

    def __init__(self, most=10**6):
        self.most = most
        self.deltas = []
        self.broken = False

    def send(self, kind, _identity, payload):
        if self.broken:
            raise NetworkError("gone")
        if len(payload) > self.most:
            raise FrameTooLargeError(len(payload), self.most)
        assert kind == "registry_delta"
        self.deltas.append(json.loads(payload))

    def names(self, what):
        return sorted(
            each["name"] if what != "removed" else each
            for delta in self.deltas
            for each in delta[what]
        )


@pytest.fixture
def loop(backend, bridge, until):
    """``loop(engine, session, dev=False, paths=())``: a running loop with its ``session`` to be replaced."""
    stop_event, made = backend.event(), []

    def start(engine, session, *, dev=False, paths=()):
        hosts = {engine.name: EngineHost(engine, bridge, backend, print)}
        place = SimpleNamespace(session=session)
        place.loop = RegistryLoop(
            hosts,
            lambda: DiscoveryHints(app_paths=list(paths)),
            lambda: place.session,
            backend,
            dev=dev,
        )
        made.append((place.loop, backend.spawn(place.loop.run, stop_event, name="registry")))
        return place

    yield start
    stop_event.set()
    for each, task in made:
        each.wake()
        assert task.join(10)


def test_all_then_what_has_changed(loop, until):
    """The first session is told everything, a later one only what differs: new, changed, gone."""
    engine, session = Engine("a", "b"), Session()
    place = loop(engine, None)
    place.session = session
    place.loop.wake()
    until(lambda: session.names("added") == ["a", "b"])
    engine.tasks = {"b": "fast", "c": None}
    place.session = second = Session()
    place.loop.wake()
    place.loop._changed(Path("tasks.py"))
    until(lambda: second.deltas)
    assert (second.names("added"), second.names("updated"), second.names("removed")) == (
        ["c"],
        ["b"],
        ["a"],
    )
    assert (session.deltas[0]["engine"], len(session.deltas), len(second.deltas)) == ("stub", 1, 1)


def test_an_interrupted_telling_is_resumed(loop, until, monkeypatch):
    """What a session did not take, the next one gets, and nothing twice."""
    monkeypatch.setattr("z4j_bare.monitoring.registry.PART", 200)
    engine, first, second = (
        Engine(*(f"task-{number}" for number in range(40))),
        Session(),
        Session(),
    )
    take = first.send
    first.send = lambda *frame: (
        take(*frame) if len(first.deltas) < 3 else setattr(first, "broken", True) or take(*frame)
    )
    place = loop(engine, first)
    until(lambda: first.broken)
    place.session = second
    place.loop.wake()
    until(lambda: len(first.names("added")) + len(second.names("added")) == 40)
    assert not set(first.names("added")) & set(second.names("added"))
    assert len(engine.hints) == 1


def test_a_small_line(loop, until):
    """Parts shrink to what the line takes; a definition that fits nowhere is left out, and the rest arrives."""
    session = Session(most=600)
    loop(Engine("x" * 490, *(f"task-{number}" for number in range(20))), session)
    until(lambda: len(session.names("added")) == 20)
    assert max(len(name) for name in session.names("added")) < 20


def test_an_engine_that_fails(loop, until, caplog):
    """An engine that cannot tell costs nothing but a line, and is asked again at the next change."""
    caplog.set_level("INFO")
    engine, session = Engine("a"), Session()
    engine.fail = True
    place = loop(engine, session)
    until(lambda: "the tasks of stub are not known: ConnectionError: no broker" in caplog.text)
    engine.fail = False
    place.loop._changed(Path("tasks.py"))
    until(lambda: session.names("added") == ["a"])


def test_development(loop, until, monkeypatch, tmp_path):
    """With dev_mode a tasks.py that changes is looked at again, in the framework's directories."""
    looks, look = [], watcher._look
    monkeypatch.setattr(watcher, "LOOK", 0.02)
    monkeypatch.setattr(watcher, "_look", lambda *args: looks.append(1) or look(*args))
    engine, session = Engine("a"), Session()
    loop(engine, session, dev=True, paths=[tmp_path])
    until(lambda: session.deltas)
    assert tmp_path in engine.hints[0].app_paths
    until(lambda: len(looks) > 1)
    engine.tasks["b"] = None
    (tmp_path / "tasks.py").write_text("b = 1")
    until(lambda: session.names("added") == ["a", "b"])


def test_what_is_sent_is_a_frame(loop, until):
    """z4j_core reads the payload as its own model of a delta."""
    session = Session()
    loop(Engine("a", "b"), session)
    until(lambda: session.deltas)
    frame = {
        "v": 2,
        "type": "registry_delta",
        "id": "rd",
        "ts": "2026-11-23T00:00:00Z",
        "nonce": "n",
        "seq": 1,
        "hmac": "h",
    }
    payload = parse_frame(json.dumps({**frame, "payload": session.deltas[0]})).payload
    assert [TaskDefinition(**each).name for each in payload.added] == ["a", "b"]


def test_celerys_tasks(bridge, backend, tmp_path):
    """Celery's tasks come in bites, loaded ones before those that only stand in a file, without their secrets."""
    celery = pytest.importorskip("celery")
    from z4j_celery import CeleryEngineAdapter

    app = celery.Celery("shop", set_as_current=False)

    def pay(user, key="s3cret"):
        return user, key

    for number in range(60):
        app.task(name=f"shop.t{number}", shared=False)(pay)
    (tmp_path / "tasks.py").write_text("@app.task\ndef declared(a, b='x'):\n    pass\n")
    host = EngineHost(CeleryEngineAdapter(celery_app=app), bridge, backend, print)
    turns = []
    found = discover(host, DiscoveryHints(app_paths=[tmp_path]), lambda: turns.append(1))
    assert len(found) == 61
    assert len(turns) > 60
    task = json.loads(found["shop.t7"])
    assert (task["signature"], task["loaded"], task["engine"]) == ("(user, key)", True, "celery")
    (declared,) = (json.loads(body) for body in found.values() if b'"loaded":false' in body)
    assert declared["name"].endswith("declared")
    assert b"s3cret" not in b"".join(found.values())


@pytest.mark.parametrize(
    ("signature", "left"),
    [
        (None, None),
        ("()", "()"),
        (
            "(a: int, b: str = 'x', *, c=None) -> dict[str, int]",
            "(a: int, b: str , *, c) -> dict[str, int]",
        ),
        ("(key='a, b=(', other={'x': [1, 2]}, last=1)", "(key, other, last)"),
        (r"""(key='it\'s, "b=', other=2)""", "(key, other)"),
        ("(key=<object (x>, other='s3cret')", "(key"),
        ("(key='never closed, s3cret", "(key"),
    ],
)
def test_defaults_are_left_out(signature, left):
    """Nothing that stands after an equals sign is told, whatever the text looks like."""
    assert strip_defaults(signature) == left
