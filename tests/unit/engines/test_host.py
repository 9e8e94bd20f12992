"""The engine host: connect, capabilities, health, and calls of the adapter."""

import asyncio

import pytest
from z4j_core.errors import RedactionConfigError
from z4j_core.models import Config
from z4j_core.redaction.engine import RedactionConfig, RedactionEngine

from tests.support.engines import FakeEngine
from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.engines.host import EngineHost, supported_kwargs
from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import merge_redaction


def config(**overrides):
    return Config(
        brain_url="http://127.0.0.1:7700", token="t", project_id="p", dev_mode=True, **overrides
    )


class FullEngine(FakeEngine):
    """An adapter with every optional method and attribute."""

    safe_retry_by_reference = True
    dropped_event_count = 3

    def __init__(self):
        super().__init__("submit_task", "cancel_task", name="fake")
        self.redaction = RedactionEngine()
        self._event_queue = asyncio.Queue()
        self._registry_delta_queue = asyncio.Queue()

    def connect_signals(self, loop=None):
        self.calls.append(("connect", loop, self.redaction))

    def disconnect_signals(self):
        self.calls.append("disconnect")

    async def subscribe_events(self):
        while True:
            yield await self._event_queue.get()

    def get_health(self):
        return {"broker_connected": True, "queue_depths": {"q": 1}, "nodes": ["a", {2}]}

    async def retry_task(self, task_id, *, priority=None):
        await asyncio.sleep(0)
        return task_id, priority

    async def cancel_task(self, task_id):
        return task_id

    async def accept_any(self, **keywords):
        return keywords


@pytest.fixture
def received():
    """The events that the hosts' sink received."""
    return []


@pytest.fixture
def make_host(bridge, backend, received):
    """``make_host(engine)``: its host, disconnected at the end."""
    hosts = []

    def host(engine):
        hosts.append(EngineHost(engine, bridge, backend, received.append))
        return hosts[-1]

    yield host
    for host in hosts:
        host.disconnect()


def test_connect_pumps_events_until_disconnect(make_host, bridge, received, until):
    """Events reach the sink; disconnecting delivers queued ones and is idempotent."""
    engine = FullEngine()
    host = make_host(engine)
    host.connect()
    assert engine.calls[0][:2] == ("connect", bridge.loop())
    bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, 1)
    until(lambda: received == [1])
    bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, 2)
    host.disconnect()
    assert received == [1, 2]
    host.disconnect()
    assert engine.calls[1:] == ["disconnect", "disconnect"]


def test_connect_without_events_does_nothing(make_host, bridge):
    """Where the agent captures events itself: no signals, no pump, no loop."""
    engine = FullEngine()
    make_host(engine).connect(events=False)
    assert engine.calls == []
    assert bridge._loop is None


def test_adapter_without_optional_methods_works(make_host):
    """The host assumes no method but ``capabilities``."""
    host = make_host(FakeEngine("submit_task", name="bare"))
    host.connect()
    assert host.capabilities() == ["submit_task"]
    assert host.health() == {}
    assert host.dropped() == 0
    host.disconnect()
    with pytest.raises(CommandError, match="bare does not support purge_queue"):
        host.invoke("purge_queue", timeout=5)


def test_failing_adapter_is_logged(make_host, caplog):
    """Exceptions in connect and disconnect are logged; commands still work."""

    class Broken(FullEngine):
        def connect_signals(self):
            raise LookupError("no broker")

        def disconnect_signals(self):
            raise LookupError("no broker")

        @property
        def dropped_event_count(self):
            raise LookupError

    host = make_host(Broken())
    host.connect()
    assert host.invoke("cancel_task", "1", timeout=5) == "1"
    assert host.dropped() == 0
    host.disconnect()
    assert "did not connect" in caplog.text
    assert "did not disconnect" in caplog.text


def test_disconnect_is_bounded(make_host, backend, caplog):
    """A ``disconnect_signals`` that hangs costs its timeout and no more."""
    release = backend.event()

    class Hanging(FullEngine):
        def disconnect_signals(self):
            release.wait(20)

    host = make_host(Hanging())
    host.connect()
    started_at = backend.now()
    host.disconnect(timeout=0.1)
    assert backend.now() - started_at < 3
    assert "did not disconnect" in caplog.text
    release.set()


def test_capabilities_are_sorted_and_current(make_host):
    """They include the retry by reference only if the adapter's flag is ``True`` itself."""
    engine = FullEngine()
    host = make_host(engine)
    assert host.capabilities() == ["cancel_task", "retry_by_reference_v1", "submit_task"]
    engine.safe_retry_by_reference = 1
    assert host.capabilities() == ["cancel_task", "submit_task"]
    assert host.dropped() == 3


def test_health_entries_are_text(make_host):
    """Keys begin with the engine's name, containers are JSON, other values are text."""
    assert make_host(FullEngine()).health() == {
        "fake.broker_connected": "True",
        "fake.queue_depths": '{"q": 1}',
        "fake.nodes": '["a", "{2}"]',
    }


def test_failed_health_check_replaces_earlier_entries(make_host):
    """A check that raises gives one error entry, not the entries of the last check."""

    class Failing(FullEngine):
        fails = False

        def get_health(self):
            if self.fails:
                raise LookupError("secret dsn")
            return {"ok": 1}

    engine = Failing()
    host = make_host(engine)
    assert host.health() == {"fake.ok": "1"}
    engine.fails = True
    assert host.health() == {"fake.error": "health check failed"}


def test_slow_health_check_is_not_started_twice(make_host, backend, until):
    """While a check runs no second one starts; its late reply is kept for the next heartbeat."""
    release, probes = backend.event(), []

    class Slow(FullEngine):
        def get_health(self):
            probes.append(1)
            release.wait(20)
            return {"ok": len(probes)}

    host = make_host(Slow())
    while not probes:  # on a busy machine the first may time out before it starts
        assert host.health(0.05) == {"fake.error": "health check failed"}
    for _ in range(3):
        assert host.health(0.05) == {"fake.error": "health check failed"}
    assert probes == [1]
    release.set()
    until(lambda: not host._probing)
    assert host._health == {"fake.ok": "1"}
    assert host.health(5) == {"fake.ok": "2"}


def test_invoke_omits_unsupported_keywords(make_host):
    """A keyword that the method does not accept is omitted if it is ``None`` or a hint."""
    host = make_host(FullEngine())
    assert host.invoke("retry_task", "1", timeout=5, priority="high", hints={"task_name": "n"}) == (
        "1",
        "high",
    )
    assert host.invoke("cancel_task", "1", timeout=5, priority=None) == "1"
    assert host.invoke("accept_any", timeout=5, hints={"b": 2}, a=1) == {"a": 1, "b": 2}
    with pytest.raises(
        CommandError, match="fake does not support cancel_task with eta and priority"
    ):
        host.invoke("cancel_task", "1", timeout=5, eta=7.0, priority="high", queue=None)
    assert supported_kwargs(dict, {"a": 1}) == {"a": 1}


def test_invoke_never_calls_twice(make_host):
    """A TypeError raised inside the method is raised, and the method is not called again."""
    calls = []

    class Raising(FullEngine):
        async def cancel_task(self, task_id):
            calls.append(task_id)
            raise TypeError("raised inside")

    with pytest.raises(TypeError, match="raised inside"):
        make_host(Raising()).invoke("cancel_task", "1", timeout=5, hints={"extra": 1})
    assert calls == ["1"]


def test_queues_of_earlier_agent_are_unbound(backend, received, until):
    """An adapter whose queues were bound by one agent delivers all events to the next."""
    engine = FullEngine()
    for generation in range(3):
        bridge = Bridge(backend)
        host = EngineHost(engine, bridge, backend, received.append)
        host.connect()
        until(lambda: engine._event_queue._getters)
        bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, generation)
        until(lambda g=generation: received[-1:] == [g])
        host._stop_pump = None  # as after a fork: the pump is not stopped
        bridge.stop(5)
    assert received == [0, 1, 2]


def test_getters_of_earlier_loop_are_removed(make_host, bridge, received, until):
    """A getter of a dead loop in the queue does not take the wake-up for the first event."""
    engine = FullEngine()
    dead = asyncio.new_event_loop()
    engine._event_queue._loop = dead
    engine._event_queue._getters.append(dead.create_future())
    make_host(engine).connect()
    until(lambda: engine._event_queue._getters)
    bridge.loop().call_soon_threadsafe(engine._event_queue.put_nowait, 1)
    until(lambda: received == [1])
    dead.close()


def test_adapter_and_operator_patterns_are_merged(make_host):
    """When the adapter connects, its redaction has its own patterns and the operator's."""
    engine = FullEngine()
    engine.redaction = RedactionEngine(
        RedactionConfig(extra_key_patterns=("own",), max_value_bytes=500)
    )
    merge_redaction(
        engine, config(redaction_extra_key_patterns=["own", "operator"], max_payload_bytes=900)
    )
    make_host(engine).connect()
    merged = engine.calls[0][2].config
    assert merged == RedactionConfig(extra_key_patterns=("own", "operator"), max_value_bytes=500)
    assert engine.redaction.scrub({"operator": 1}) == {"operator": "[REDACTED]"}


def test_redaction_limit_and_default_patterns_are_merged():
    """The operator's limit replaces the default; either side may disable the built-in patterns."""
    engine = FullEngine()
    merge_redaction(engine, config(max_payload_bytes=20_000, redaction_extra_value_patterns=["v"]))
    assert engine.redaction.config == RedactionConfig(
        extra_value_patterns=("v",), max_value_bytes=20_000
    )
    merge_redaction(engine, config(max_payload_bytes=20_000, redaction_defaults_enabled=False))
    assert engine.redaction.config.default_patterns_enabled is False
    engine.redaction = foreign = object()
    merge_redaction(engine, config())
    assert engine.redaction is foreign


def test_invalid_pattern_is_refused():
    """An invalid pattern raises before any event is captured."""
    with pytest.raises(RedactionConfigError):
        merge_redaction(FullEngine(), config(redaction_extra_key_patterns=["("]))
