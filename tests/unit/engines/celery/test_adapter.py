"""The real Celery adapter on an in-memory broker."""

import asyncio

import pytest

celery = pytest.importorskip("celery")
z4j_celery = pytest.importorskip("z4j_celery")

from celery import signals  # noqa: E402

from z4j_bare.asyncio_bridge.bridge import Bridge  # noqa: E402
from z4j_bare.engines.host import EngineHost  # noqa: E402


@pytest.fixture
def app():
    made = celery.Celery(
        "z4j-test", broker="memory://", backend="cache+memory://", set_as_current=False
    )
    made.conf.task_always_eager = True
    made.conf.task_store_eager_result = True
    yield made
    made.close()


@pytest.fixture
def sunk():
    return []


@pytest.fixture
def host(app, backend, sunk):
    bridge = Bridge(backend)
    adapter = z4j_celery.CeleryEngineAdapter(celery_app=app)
    made = EngineHost(adapter, bridge, backend, sunk.append)
    yield made
    made.disconnect()
    bridge.stop(5)


def test_submit_runs_an_eager_task_that_sees_no_loop(host, app):
    """submit_task, an offloading method, executes; the task may use asyncio.run."""
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


def test_cancel_publishes_a_revoke(host, app):
    """cancel_task reaches the control exchange."""
    sent = []
    app.control.revoke = lambda *args, **kwargs: sent.append((args, kwargs))
    result = host.invoke("cancel_task", "abc", timeout=15, priority=None)
    assert result.status == "success"
    assert sent == [(("abc",), {"terminate": True, "signal": "SIGTERM"})]


def test_cancel_over_the_memory_broker(host):
    """The same with the real control object: nothing hangs, nothing fails."""
    assert host.invoke("cancel_task", "abc", timeout=15).status == "success"


def test_a_hung_broker_is_reported_as_indeterminate(host, app, backend, monkeypatch):
    """The adapter's own time-out fires in its task and yields its own indeterminate result."""
    release = backend.event()
    monkeypatch.setattr("z4j_celery.actions.cancel._REVOKE_TIMEOUT", 0.1)
    app.control.revoke = lambda *_args, **_kwargs: release.wait(20)
    result = host.invoke("cancel_task", "abc", timeout=15)
    assert result.status == "failed"
    assert result.result["indeterminate"] is True
    release.set()


def test_await_free_methods(host, app):
    """Discovery and reconciliation, which await nothing, run with no loop built."""

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


def test_capabilities(host):
    """What the adapter can do, and that its retries are safe by reference."""
    assert {"submit_task", "cancel_task", "retry_by_reference_v1"} <= set(host.capabilities())


def test_health(host, app):
    """The blocking probe answers in the heartbeat's form."""
    app.control.inspect = lambda **_: type("Inspect", (), {"stats": lambda _: {}})()
    health = host.health(10)
    assert health["celery.broker_connected"] == "True"
    assert health["celery.queue_depths"].startswith("{")


def test_signals_arrive_as_events(host, app, sunk, until):
    """Connected to the live signals, a task's life comes out of the sink in order; disconnecting ends it."""

    @app.task(name="t.lives", shared=False)
    def lives():
        return 1

    host.connect()
    for _ in range(20):
        lives.apply_async()
    until(lambda: len(sunk) >= 40)
    kinds = [str(event.kind) for event in sunk]
    assert kinds[0].endswith("started")
    assert kinds[1].endswith("succeeded")
    assert host.dropped() == 0
    host.disconnect()
    before = len(sunk)
    lives.apply_async()
    assert not signals.task_prerun.receivers or len(sunk) == before
