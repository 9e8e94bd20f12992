"""The task registry: discovery, comparison with the last report, and frames."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from z4j_core.models import DiscoveryHints, TaskDefinition
from z4j_core.transport.frames import parse_frame

from tests.support.engines import FakeEngine
from z4j_bare import watcher
from z4j_bare.engines.discovery import discover, strip_defaults
from z4j_bare.engines.host import EngineHost
from z4j_bare.errors import FrameTooLargeError, NetworkError
from z4j_bare.monitoring.registry import RegistryLoop
from z4j_bare.wire.fit import fit_name


class RegistryEngine(FakeEngine):
    """An engine with these tasks; ``hints`` holds the hints of each discovery."""

    def __init__(self, *names):
        super().__init__()
        self.tasks = dict.fromkeys(names)
        self.hints = []
        self.fail = False

    async def discover_tasks(self, hints=None):
        self.hints.append(hints)
        if self.fail:
            raise ConnectionError("no broker")
        return [
            TaskDefinition(name=name, engine="stub", queue=queue)
            for name, queue in self.tasks.items()
        ]


class FakeConnection:
    """Records what is sent, and refuses payloads above ``max_bytes``."""

    def __init__(self, max_bytes=10**6):
        self.max_bytes = max_bytes
        self.deltas = []
        self.broken = False

    def send(self, kind, _identity, payload):
        if self.broken:
            raise NetworkError("gone")
        if len(payload) > self.max_bytes:
            raise FrameTooLargeError(len(payload), self.max_bytes)
        assert kind == "registry_delta"
        self.deltas.append(json.loads(payload))

    def names(self, change):
        """Return the tasks that were ``added``, ``updated`` or ``removed``."""
        return sorted(
            item["name"] if change != "removed" else item
            for delta in self.deltas
            for item in delta[change]
        )


@pytest.fixture
def loop(backend, bridge, until):
    """``loop(engine, connection)``: a running loop, whose ``connection`` the test may replace."""
    stop_event, running = backend.event(), []

    def start(engine, connection, *, dev=False, paths=()):
        hosts = {engine.name: EngineHost(engine, bridge, backend, print)}
        harness = SimpleNamespace(connection=connection)
        harness.loop = RegistryLoop(
            hosts,
            lambda: DiscoveryHints(app_paths=list(paths)),
            lambda: harness.connection,
            backend,
            dev=dev,
        )
        running.append((harness.loop, backend.spawn(harness.loop.run, stop_event, name="registry")))
        return harness

    yield start
    stop_event.set()
    for registry, task in running:
        registry.wake()
        assert task.join(10)


def test_first_session_gets_all_tasks_and_later_ones_changes(loop, until):
    """A later connection gets only the tasks that were added, updated or removed."""
    engine, connection = RegistryEngine("a", "b"), FakeConnection()
    harness = loop(engine, None)
    harness.connection = connection
    harness.loop.wake()
    until(lambda: connection.names("added") == ["a", "b"])
    engine.tasks = {"b": "fast", "c": None}
    harness.connection = second = FakeConnection()
    harness.loop.wake()
    harness.loop._on_change(Path("tasks.py"))
    until(lambda: second.deltas)
    assert (second.names("added"), second.names("updated"), second.names("removed")) == (
        ["c"],
        ["b"],
        ["a"],
    )
    assert (connection.deltas[0]["engine"], len(connection.deltas), len(second.deltas)) == (
        "stub",
        1,
        1,
    )


def test_next_session_gets_unsent_tasks_after_interruption(loop, until, monkeypatch):
    """The next connection gets the tasks that the first has not accepted, and no other."""
    monkeypatch.setattr("z4j_bare.monitoring.registry.MAX_DELTA_BYTES", 200)
    engine, first, second = (
        RegistryEngine(*(f"task-{number}" for number in range(40))),
        FakeConnection(),
        FakeConnection(),
    )
    accept = first.send
    first.send = lambda *frame: (
        accept(*frame)
        if len(first.deltas) < 3
        else setattr(first, "broken", True) or accept(*frame)
    )
    harness = loop(engine, first)
    until(lambda: first.broken)
    harness.connection = second
    harness.loop.wake()
    until(lambda: len(first.names("added")) + len(second.names("added")) == 40)
    assert not set(first.names("added")) & set(second.names("added"))
    assert len(engine.hints) == 1


def test_deltas_shrink_to_frame_limit(loop, until):
    """A definition that exceeds the limit alone is left out; all others arrive."""
    connection = FakeConnection(max_bytes=600)
    loop(RegistryEngine("x" * 490, *(f"task-{number}" for number in range(20))), connection)
    until(lambda: len(connection.names("added")) == 20)
    assert max(len(name) for name in connection.names("added")) < 20


def test_discovery_is_retried_after_engine_failure(loop, until, caplog):
    """A failed discovery is logged and repeated at the next change."""
    caplog.set_level("INFO")
    engine, connection = RegistryEngine("a"), FakeConnection()
    engine.fail = True
    harness = loop(engine, connection)
    until(lambda: "tasks of stub, next attempt in 300 s: ConnectionError: no broker" in caplog.text)
    engine.fail = False
    harness.loop._on_change(Path("tasks.py"))
    until(lambda: connection.names("added") == ["a"])


def test_changed_tasks_file_triggers_discovery_in_dev_mode(loop, until, monkeypatch, tmp_path):
    """The directories of the framework are watched for a ``tasks.py`` that changes."""
    scans, scan = [], watcher._scan
    monkeypatch.setattr(watcher, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(watcher, "_scan", lambda *args: scans.append(1) or scan(*args))
    engine, connection = RegistryEngine("a"), FakeConnection()
    loop(engine, connection, dev=True, paths=[tmp_path])
    until(lambda: connection.deltas)
    assert tmp_path in engine.hints[0].app_paths
    until(lambda: len(scans) > 1)
    engine.tasks["b"] = None
    (tmp_path / "tasks.py").write_text("b = 1")
    until(lambda: connection.names("added") == ["a", "b"])


def test_delta_matches_model_of_brain(loop, until):
    """z4j_core parses the payload of a ``registry_delta``."""
    connection = FakeConnection()
    loop(RegistryEngine("a", "b"), connection)
    until(lambda: connection.deltas)
    frame = {
        "v": 2,
        "type": "registry_delta",
        "id": "rd",
        "ts": "2026-11-23T00:00:00Z",
        "nonce": "n",
        "seq": 1,
        "hmac": "h",
    }
    payload = parse_frame(json.dumps({**frame, "payload": connection.deltas[0]})).payload
    assert [TaskDefinition(**each).name for each in payload.added] == ["a", "b"]


def test_celery_tasks_are_discovered_in_steps_without_defaults(bridge, backend, tmp_path):
    """Discovery yields between tasks, finds loaded and declared ones, and drops default values."""
    celery = pytest.importorskip("celery")
    from z4j_celery import CeleryEngineAdapter

    app = celery.Celery("shop", set_as_current=False)

    def pay(user, key="s3cret"):
        return user, key

    for number in range(60):
        app.task(name=f"shop.t{number}", shared=False)(pay)
    (tmp_path / "tasks.py").write_text("@app.task\ndef declared(a, b='x'):\n    pass\n")
    host = EngineHost(CeleryEngineAdapter(celery_app=app), bridge, backend, print)
    checkpoints = []
    found = discover(host, DiscoveryHints(app_paths=[tmp_path]), lambda: checkpoints.append(1))
    assert len(found) == 61
    assert len(checkpoints) > 60
    task = json.loads(found["shop.t7"])
    assert (task["signature"], task["loaded"], task["engine"]) == ("(user, key)", True, "celery")
    (declared,) = (json.loads(body) for body in found.values() if b'"loaded":false' in body)
    assert declared["name"].endswith("declared")
    assert b"s3cret" not in b"".join(found.values())


def test_discovery_fits_names_to_brain_database(backend, bridge):
    """A definition's name has no NUL and at most 500 characters, as in the task's events."""
    celery = pytest.importorskip("celery")
    from z4j_celery import CeleryEngineAdapter

    app = celery.Celery("shop", set_as_current=False)

    def run():
        pass

    for name in ("shop.a\0b", "n" * 600):
        app.task(name=name, shared=False)(run)
    host = EngineHost(CeleryEngineAdapter(celery_app=app), bridge, backend, print)
    found = discover(host, DiscoveryHints(), lambda: None)
    expected = {"shop.a\ufffdb", fit_name("n" * 600, 500)}
    assert expected <= set(found)
    assert {json.loads(found[name])["name"] for name in expected} == expected
    assert b"\\u0000" not in b"".join(found.values())


@pytest.mark.parametrize(
    ("signature", "stripped"),
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
def test_strip_defaults_removes_all_default_values(signature, stripped):
    """No text after an equals sign remains, even if the signature is malformed."""
    assert strip_defaults(signature) == stripped
