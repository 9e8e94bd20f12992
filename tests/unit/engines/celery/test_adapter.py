"""The z4j-celery adapter on kombu's memory transport."""

import asyncio

import pytest

pytest.importorskip("celery")
pytest.importorskip("z4j_celery")

import z4j_celery
from celery import signals

from tests.support.celery_fakes import memory_app
from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.engines.host import EngineHost


@pytest.fixture
def app():
    app = memory_app("z4j-test")
    app.conf.task_always_eager = True
    app.conf.task_store_eager_result = True
    yield app
    app.close()


@pytest.fixture
def received():
    return []


@pytest.fixture
def host(app, backend, received):
    bridge = Bridge(backend)
    adapter = z4j_celery.CeleryEngineAdapter(celery_app=app)
    host = EngineHost(adapter, bridge, backend, received.append)
    yield host
    host.disconnect()
    bridge.stop(5)


def test_submit_runs_eager_task_without_running_loop(host, app):
    """``submit_task`` runs the task, which can use ``asyncio.run``."""
    seen = []

    @app.task(name="t.work", shared=False)
    def work(number):
        async def program():
            await asyncio.sleep(0.001)
            return number

        seen.append((asyncio._get_running_loop(), asyncio.run(program())))

    result = host.invoke("submit_task", "t.work", args=(3,), timeout=15)
    assert (result.status, result.error) == ("success", None)
    assert result.result["task_id"]
    assert seen == [(None, 3)]


def test_cancel_task_publishes_revoke(host, app):
    """``cancel_task`` calls ``control.revoke`` with terminate."""
    sent = []
    app.control.revoke = lambda *args, **kwargs: sent.append((args, kwargs))
    result = host.invoke("cancel_task", "abc", timeout=15, priority=None)
    assert result.status == "success"
    assert sent == [(("abc",), {"terminate": True, "signal": "SIGTERM"})]


def test_cancel_task_succeeds_over_memory_broker(host):
    """``cancel_task`` with the real control object neither hangs nor fails."""
    assert host.invoke("cancel_task", "abc", timeout=15).status == "success"


def test_cancel_task_is_indeterminate_when_broker_hangs(host, app, backend, monkeypatch):
    """The adapter's own timeout fires and returns its indeterminate result."""
    release = backend.event()
    monkeypatch.setattr("z4j_celery.actions.cancel._REVOKE_TIMEOUT", 0.1)
    app.control.revoke = lambda *_args, **_kwargs: release.wait(20)
    result = host.invoke("cancel_task", "abc", timeout=15)
    assert result.status == "failed"
    assert result.result["indeterminate"] is True
    release.set()


def test_methods_without_await_build_no_loop(host, app):
    """Discovery and reconciliation await nothing and run without a loop."""

    @app.task(name="t.found", shared=False)
    def found():
        return 1

    assert "t.found" in [
        definition.name for definition in host.invoke("discover_tasks", timeout=15)
    ]
    outcome = found.apply_async()
    reconciled = host.invoke("reconcile_task", outcome.id, timeout=15)
    assert reconciled.result["engine_state"] == "success"
    assert host._bridge._loop is None


def test_capabilities_include_retry_by_reference(host):
    """The adapter's actions are listed, and its retries are by reference."""
    assert {"submit_task", "cancel_task", "retry_by_reference_v1"} <= set(host.capabilities())


def test_health_has_heartbeat_form(host, app):
    """The blocking health check returns entries for the heartbeat."""
    app.control.inspect = lambda **_: type("Inspect", (), {"stats": lambda _: {}})()
    health = host.health(10)
    assert health["celery.broker_connected"] == "True"
    assert health["celery.queue_depths"].startswith("{")


def test_adapter_signals_arrive_as_events(host, app, received, until):
    """With signals connected the events of a task reach the sink in order; disconnecting stops
    them.
    """

    @app.task(name="t.lives", shared=False)
    def lives():
        return 1

    host.connect()
    for _ in range(20):
        lives.apply_async()
    until(lambda: len(received) >= 40)
    kinds = [str(event.kind) for event in received]
    assert kinds[0].endswith("started")
    assert kinds[1].endswith("succeeded")
    assert host.dropped() == 0
    host.disconnect()
    before = len(received)
    lives.apply_async()
    assert not signals.task_prerun.receivers or len(received) == before
