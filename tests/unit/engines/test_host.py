"""One engine adapter, hosted: every probe, every limit."""

import asyncio

import pytest
from z4j_core.errors import RedactionConfigError
from z4j_core.models import Config
from z4j_core.redaction.engine import RedactionConfig, RedactionEngine

from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.engines.host import EngineHost, supported_kwargs
from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import merge_redaction


def config(**overrides):
    return Config(
        brain_url="http://127.0.0.1:7700", token="t", project_id="p", dev_mode=True, **overrides
    )


class Engine:
    """An adapter with everything."""

    name = "fake"
    safe_retry_by_reference = True
    dropped_event_count = 3

    def __init__(self):
        self.redaction = RedactionEngine()
        self._event_queue = asyncio.Queue()
        self._registry_delta_queue = asyncio.Queue()
        self.seen = []

    def connect_signals(self, loop=None):
        self.seen.append(("connect", loop, self.redaction))

    def disconnect_signals(self):
        self.seen.append("disconnect")

    async def subscribe_events(self):
        while True:
            yield await self._event_queue.get()

    def capabilities(self):
        return {"submit_task", "cancel_task"}

    def get_health(self):
        return {"broker_connected": True, "queue_depths": {"q": 1}, "nodes": ["a", {2}]}

    async def retry_task(self, task_id, *, priority=None):
        await asyncio.sleep(0)
        return task_id, priority

    async def cancel_task(self, task_id):
        return task_id

    async def anything(self, **keywords):
        return keywords


class Bare:
    """An adapter with nothing that can be left out."""

    name = "bare"

    def capabilities(self):
        return {"submit_task"}


@pytest.fixture
def sunk():
    return []


@pytest.fixture
def hosted(bridge, backend, sunk):
    """``hosted(engine)``: its host."""
    hosts = []

    def host(engine):
        hosts.append(EngineHost(engine, bridge, backend, sunk.append))
        return hosts[-1]

    yield host
    for host in hosts:
        host.disconnect()


def test_connect_and_disconnect(hosted, bridge, sunk, until):
    """Signals are connected with the bridge's own loop, events flow to the sink, disconnecting drains and is idempotent."""
    engine = Engine()
    host = hosted(engine)
    host.connect()
    assert engine.seen[0][:2] == ("connect", bridge.loop())
    bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, 1)
    until(lambda: sunk == [1])
    bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, 2)
    host.disconnect()
    assert sunk == [1, 2]
    host.disconnect()
    assert engine.seen[1:] == ["disconnect", "disconnect"]


def test_connect_without_events(hosted, bridge):
    """Where tasks are captured in process, the adapter is left alone: no signals, no pump, no loop."""
    engine = Engine()
    hosted(engine).connect(events=False)
    assert engine.seen == []
    assert bridge._loop is None


def test_an_adapter_with_nothing(hosted):
    """No probe assumes an attribute."""
    host = hosted(Bare())
    host.connect()
    assert host.capabilities() == ["submit_task"]
    assert host.health() == {}
    assert host.dropped() == 0
    host.disconnect()
    with pytest.raises(CommandError, match="bare does not support purge_queue"):
        host.invoke("purge_queue", timeout=5)


def test_a_failing_adapter_does_not_fail_us(hosted, caplog):
    """Exceptions in connect and disconnect are logged; commands still work."""

    class Broken(Engine):
        def connect_signals(self):
            raise LookupError("no broker")

        def disconnect_signals(self):
            raise LookupError("no broker")

        @property
        def dropped_event_count(self):
            raise LookupError

    host = hosted(Broken())
    host.connect()
    assert host.invoke("cancel_task", "1", timeout=5) == "1"
    assert host.dropped() == 0
    host.disconnect()
    assert "did not connect" in caplog.text
    assert "did not disconnect" in caplog.text


def test_disconnect_is_bounded(hosted, backend, caplog):
    """A disconnect_signals that hangs costs its time-out, no more."""
    release = backend.event()

    class Hanging(Engine):
        def disconnect_signals(self):
            release.wait(20)

    host = hosted(Hanging())
    host.connect()
    began = backend.now()
    host.disconnect(timeout=0.1)
    assert backend.now() - began < 3
    assert "did not disconnect" in caplog.text
    release.set()


def test_capabilities(hosted):
    """They are sorted, fresh, and say when a retry by reference is safe: only True itself counts."""
    engine = Engine()
    host = hosted(engine)
    assert host.capabilities() == ["cancel_task", "retry_by_reference_v1", "submit_task"]
    engine.safe_retry_by_reference = 1
    assert host.capabilities() == ["cancel_task", "submit_task"]
    assert host.dropped() == 3


def test_health(hosted):
    """Keys carry the engine's name, containers are JSON, the rest is text."""
    assert hosted(Engine()).health() == {
        "fake.broker_connected": "True",
        "fake.queue_depths": '{"q": 1}',
        "fake.nodes": '["a", "{2}"]',
    }


def test_health_that_fails(hosted):
    """A probe that raises yields one entry that says so, instead of yesterday's good news."""

    class Sick(Engine):
        ill = False

        def get_health(self):
            if self.ill:
                raise LookupError("secret dsn")
            return {"ok": 1}

    engine = Sick()
    host = hosted(engine)
    assert host.health() == {"fake.ok": "1"}
    engine.ill = True
    assert host.health() == {"fake.error": "health check failed"}


def test_health_that_takes_too_long(hosted, backend, until):
    """A slow probe is never started twice, and its late answer is kept for the next heartbeat."""
    release, probes = backend.event(), []

    class Slow(Engine):
        def get_health(self):
            probes.append(1)
            release.wait(20)
            return {"ok": len(probes)}

    host = hosted(Slow())
    while not probes:  # on a busy machine the first may time out before it begins
        assert host.health(0.05) == {"fake.error": "health check failed"}
    for _ in range(3):
        assert host.health(0.05) == {"fake.error": "health check failed"}
    assert probes == [1]
    release.set()
    until(lambda: not host._probing)
    assert host._health == {"fake.ok": "1"}
    assert host.health(5) == {"fake.ok": "2"}


def test_invoke_leaves_out_unknown_keywords(hosted):
    """Empty keywords and hints that an adapter's method does not take are dropped; one that takes any gets all."""
    host = hosted(Engine())
    assert host.invoke("retry_task", "1", timeout=5, priority="high", hints={"task_name": "n"}) == (
        "1",
        "high",
    )
    assert host.invoke("cancel_task", "1", timeout=5, priority=None) == "1"
    assert host.invoke("anything", timeout=5, hints={"b": 2}, a=1) == {"a": 1, "b": 2}
    with pytest.raises(
        CommandError, match="fake does not support cancel_task with eta and priority"
    ):
        host.invoke("cancel_task", "1", timeout=5, eta=7.0, priority="high", queue=None)
    assert supported_kwargs(dict, {"a": 1}) == {"a": 1}


def test_invoke_never_calls_twice(hosted):
    """A TypeError from inside the action is the action's own."""
    calls = []

    class Typed(Engine):
        async def cancel_task(self, task_id):
            calls.append(task_id)
            raise TypeError("from inside")

    with pytest.raises(TypeError, match="from inside"):
        hosted(Typed()).invoke("cancel_task", "1", timeout=5, hints={"extra": 1})
    assert calls == ["1"]


def test_queues_of_an_earlier_agent_are_freed(backend, sunk, until):
    """An adapter whose queues were bound by one agent delivers everything to the next."""
    engine = Engine()
    for generation in range(3):
        bridge = Bridge(backend)
        host = EngineHost(engine, bridge, backend, sunk.append)
        host.connect()
        until(lambda: engine._event_queue._getters)
        bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, generation)
        until(lambda g=generation: sunk[-1:] == [g])
        host._end_pump = None  # as if the process had forked: nobody said goodbye
        bridge.stop(5)
    assert sunk == [0, 1, 2]


def test_dead_getters_are_forgotten(hosted, bridge, sunk, until):
    """A getter that a forked copy left in the queue does not swallow the wake-up for the first event."""
    engine = Engine()
    dead = asyncio.new_event_loop()
    engine._event_queue._loop = dead
    engine._event_queue._getters.append(dead.create_future())
    hosted(engine).connect()
    until(lambda: engine._event_queue._getters)
    bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, 1)
    until(lambda: sunk == [1])
    dead.close()


def test_redaction_is_merged(hosted):
    """What the adapter captures when it connects has its own patterns and the operator's."""
    engine = Engine()
    engine.redaction = RedactionEngine(
        RedactionConfig(extra_key_patterns=("own",), max_value_bytes=500)
    )
    merge_redaction(
        engine, config(redaction_extra_key_patterns=["own", "theirs"], max_payload_bytes=900)
    )
    hosted(engine).connect()
    merged = engine.seen[0][2].config
    assert merged == RedactionConfig(extra_key_patterns=("own", "theirs"), max_value_bytes=500)
    assert engine.redaction.scrub({"theirs": 1}) == {"theirs": "[REDACTED]"}


def test_redaction_limits_and_switches():
    """The operator's limit replaces the default; either side may switch the built-in patterns off; nobody does by accident."""
    engine = Engine()
    merge_redaction(engine, config(max_payload_bytes=20_000, redaction_extra_value_patterns=["v"]))
    assert engine.redaction.config == RedactionConfig(
        extra_value_patterns=("v",), max_value_bytes=20_000
    )
    merge_redaction(engine, config(max_payload_bytes=20_000, redaction_defaults_enabled=False))
    assert engine.redaction.config.default_patterns_enabled is False
    engine.redaction = foreign = object()
    merge_redaction(engine, config())
    assert engine.redaction is foreign


def test_a_bad_pattern_is_refused():
    """A pattern that cannot be compiled stops the agent before anything is captured."""
    with pytest.raises(RedactionConfigError):
        merge_redaction(Engine(), config(redaction_extra_key_patterns=["("]))
