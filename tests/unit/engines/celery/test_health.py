"""Health probes of Celery's broker and workers."""

import inspect
import json
import socket
import time
from importlib.metadata import version
from types import SimpleNamespace

import pytest

pytest.importorskip("celery")

from celery import Celery
from celery.worker import state
from kombu.exceptions import OperationalError
from kombu.utils import functional as functional_module

from tests.support.celery_fakes import memory_app
from z4j_bare.engines.celery import broker_health, engine, green_kombu, worker_health, worker_start
from z4j_bare.engines.celery.broker_health import BrokerProbe, ConsumerWatch, describe_cause
from z4j_bare.engines.celery.engine import CeleryEngine, broker_connection, open_connection
from z4j_bare.engines.celery.worker_health import WorkerDetails, local_details, remote_details
from z4j_bare.monitoring import health as probes


class FakeRequest:
    """A running task, with the ``info`` of Celery's Request."""

    def info(self, safe):
        return {"id": "1", "name": "t.pays", "args": "('4111',)", "kwargs": "{}", "safe": safe}


class ChangingSet(set):
    """A set that another thread changes during the first iterations."""

    failures = 2

    def __iter__(self):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("Set changed size during iteration")
        return super().__iter__()


@pytest.fixture
def app():
    app = memory_app("z4j-health")

    @app.task(name="t.pays", shared=False)
    def pays():
        return None

    app.conf.worker_prefetch_multiplier = 7
    yield app
    app.close()


@pytest.fixture
def consumer(app):
    queue = app.amqp.queues["celery"]
    controller = SimpleNamespace(stats=lambda: {"pid": 7, "pool": {"max-concurrency": 3}})
    return SimpleNamespace(
        app=app,
        hostname="w@web-1.example.com",
        controller=controller,
        task_consumer=SimpleNamespace(queues=[queue]),
    )


def test_local_details_need_no_remote_control(app, consumer, monkeypatch):
    """Statistics, queues, tasks and settings are read from the worker's objects, without
    credentials.
    """
    monkeypatch.setattr(app, "control", None)
    monkeypatch.setattr(state, "active_requests", [FakeRequest()])
    facts = local_details(consumer)["w@web-1.example.com"]
    assert facts["stats"]["pool"] == {"max-concurrency": 3}
    assert [queue["name"] for queue in facts["active_queues"]] == ["celery"]
    assert facts["registered"] == ["t.pays"]
    assert facts["conf"]["worker_prefetch_multiplier"] == 7
    assert "broker_url" not in facts["conf"]


def test_local_details_omit_arguments_of_running_tasks(consumer, monkeypatch):
    """The brain stores worker details unredacted, so they contain no arguments."""
    monkeypatch.setattr(state, "active_requests", [FakeRequest()])
    assert local_details(consumer)["w@web-1.example.com"]["active"] == [
        {"id": "1", "name": "t.pays", "safe": True}
    ]


def test_local_details_copy_changing_set_again(consumer, monkeypatch):
    """A set that changes during the copy is copied again; after three failures it is omitted."""
    changing = ChangingSet([FakeRequest()])
    monkeypatch.setattr(state, "active_requests", changing)
    assert len(local_details(consumer)["w@web-1.example.com"]["active"]) == 1
    changing.failures = 3
    assert "active" not in local_details(consumer)["w@web-1.example.com"]


def test_local_details_omit_queues_while_reconnecting(consumer, monkeypatch):
    """Between two broker connections there is no task consumer; the rest is still reported."""
    consumer.task_consumer = None
    assert "active_queues" not in local_details(consumer)["w@web-1.example.com"]


def test_remote_details_use_unpooled_connection(app, monkeypatch):
    """The request uses no pooled connection, whose replies a forked child would read."""
    used = []

    class Inspect:
        def __init__(self, timeout, connection):
            connection.connect()
            used.append((connection, connection in app.pool._dirty))

        def stats(self):
            return {"w@there": {"pid": 1}}

    monkeypatch.setattr(app.control, "inspect", Inspect)
    assert remote_details(app) == {"w@there": {"stats": {"pid": 1}}}
    ((connection, pooled),) = used
    assert not pooled
    assert not connection.connected


def test_remote_details_are_empty_without_replies(app, monkeypatch):
    """If no worker replies there are no details and no error."""
    monkeypatch.setattr(worker_health, "REPLY_TIMEOUT", 0.01)
    assert remote_details(app) == {}


def test_worker_details_are_cached_for_a_minute(app, consumer):
    """The details are read once a minute, and a name that the brain would redact is rewritten."""
    now, reads = [100.0], []
    consumer.controller.stats = lambda: reads.append(1) or {}
    details = WorkerDetails(app, consumer, lambda name: "@" in name, clock=lambda: now[0])
    assert list(json.loads(details())) == ["w@web-1_example_com"]
    now[0] += worker_health.DETAILS_TTL - 1
    details()
    assert len(reads) == 1
    now[0] += 1
    details()
    assert len(reads) == 2


def test_broker_probe_reports_type_and_queue_depths(app):
    """A broker that answers is connected; its type and the depth of each queue are reported."""
    probe = BrokerProbe("celery", app, lambda: ["idle"])
    try:
        answer = probe()
        assert (answer["celery.broker_connected"], answer["celery.broker_type"]) == (
            "True",
            "memory",
        )
        assert json.loads(answer["celery.queue_depths"]) == {"idle": 0}
    finally:
        probe.close()


def test_broker_probe_reuses_channel_until_it_fails(app):
    """Probes share a channel; a stale one is replaced in the same probe."""
    probe = BrokerProbe("celery", app, lambda: ["one", "two"])
    try:
        probe()
        kept = probe._channel
        assert probe()["celery.broker_connected"] == "True"
        assert probe._channel is kept

        def stale(**_options):
            raise ConnectionResetError

        kept.queue_declare = stale
        assert probe()["celery.broker_connected"] == "True"
        assert probe._channel not in (None, kept)
    finally:
        probe.close()


def test_broker_probe_reports_refused_connection(app):
    """A refused connection is reported without the broker's address."""
    app.conf.broker_url = "redis://:secret@127.0.0.1:1/0"
    answer = BrokerProbe("celery", app, lambda: ["celery"])()
    assert answer["celery.broker_connected"] == "False"
    assert "secret" not in str(answer)


def test_cached_probe_runs_once_at_a_time(bridge, backend, monkeypatch, until):
    """While a check runs the probe fails, and the late answer is used next."""
    monkeypatch.setattr(probes, "CHECK_TIMEOUT", 0.05)
    go, runs = backend.event(), []

    def check():
        runs.append(1)
        go.wait()
        return {"x": str(len(runs))}

    probe = probes.CachedProbe(bridge, check, lambda error: {"failed": type(error).__name__})
    assert probe() == {"failed": "TimeoutError"}
    assert probe() == {"failed": "TimeoutError"}
    assert len(runs) == 1
    go.set()
    until(lambda: probe().get("x"))


def test_cached_probe_returns_entries_for_error(bridge):
    """An exception becomes the entries that the caller provides for it."""
    probe = probes.CachedProbe(
        bridge, lambda: 1 / 0, lambda error: {"failed": type(error).__name__}
    )
    assert probe() == {"failed": "ZeroDivisionError"}


def test_broker_probe_omits_queue_that_broker_refuses(app, monkeypatch):
    """A queue whose depth the broker refuses is omitted, and the broker counts as connected."""
    probe = BrokerProbe("celery", app, lambda: ["exclusive", "idle"])
    connection = probe._connect()
    refusal = connection.channel_errors[0]("locked")
    refusal.reply_code = 405
    declare = connection.default_channel.queue_declare

    def refuse(queue, passive):
        if queue == "exclusive":
            raise refusal
        return declare(queue=queue, passive=passive)

    monkeypatch.setattr(
        type(connection.default_channel), "queue_declare", lambda _self, **k: refuse(**k)
    )
    try:
        answer = probe()
        assert answer["celery.broker_connected"] == "True"
        assert json.loads(answer["celery.queue_depths"]) == {"idle": 0}
    finally:
        probe.close()


def test_check_that_ended_during_blocked_hub_is_used(backend):
    """If both the result and the timeout are there after the hub was blocked, the result counts."""

    class LateBridge:
        def call(self, function, timeout):
            del timeout
            function()
            raise TimeoutError

    probe = probes.CachedProbe(LateBridge(), lambda: {"x": "1"}, lambda _error: {"failed": "1"})
    assert probe() == {"x": "1"}


def test_broker_error_names_cause(app):
    """The class of the system's error is reported, although kombu wraps it."""
    app.conf.broker_url = "redis://127.0.0.1:1/0"
    probe = BrokerProbe("celery", app, lambda: ["celery"])
    assert probe()["celery.broker_error"] == "ConnectionRefusedError"
    assert not probe.connected


class NotAllowedError(Exception):
    reply_code = 530


@pytest.mark.parametrize(
    ("raised", "cause", "name"),
    [
        (OperationalError("x"), ConnectionResetError(), "ConnectionResetError"),
        (OperationalError("x"), NotAllowedError("x"), "NotAllowedError 530"),
        (OperationalError("x"), None, "OperationalError"),
        (ValueError("x"), None, "ValueError"),
    ],
)
def test_cause_of_wrapped_error_is_described(raised, cause, name):
    """A system's error counts, else what kombu wraps, else the error itself."""
    raised.__cause__ = cause
    assert describe_cause(raised) == name


def channel(**fields):
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("channels", "in_trouble"),
    [
        ([], False),
        ([channel()], False),
        ([channel(_in_poll=None, _brpop_sent_at=1.0, brpop_timeout=1)], False),
        ([channel(_in_poll=object(), _brpop_sent_at=98.5, brpop_timeout=1)], False),
        ([channel(), channel(_in_poll=object(), _brpop_sent_at=96.0, brpop_timeout=1)], True),
        ([channel(_in_poll=object(), _brpop_sent_at=96.0, brpop_timeout=5)], False),
    ],
)
def test_worker_that_waits_too_long_for_answer_is_in_trouble(monkeypatch, channels, in_trouble):
    """Redis answers within ``brpop_timeout``; a channel that does not poll waits for no answer."""
    monkeypatch.setattr(broker_health, "monotonic", lambda: 100.0)
    transport = SimpleNamespace(channels=channels)
    watch = ConsumerWatch(SimpleNamespace(connection=SimpleNamespace(_transport=transport)))
    assert watch.in_trouble() is in_trouble


def test_broken_connection_of_worker_is_reported(app):
    """A broker that answers the probe, but not the worker, is reported as not connected."""
    silence = [11.0]
    probe = BrokerProbe("celery", app, lambda: ["celery"], lambda: silence[0])
    try:
        assert probe() == {
            "celery.broker_connected": "False",
            "celery.broker_error": broker_health.BROKEN,
        }
        assert not probe.connected
        silence[0] = 9.0
        assert probe()["celery.broker_connected"] == "True"
    finally:
        probe.close()


def test_failed_connect_does_not_wait_in_kombu(app, monkeypatch):
    """Kombu's ``sleep``, which blocks the hub of a gevent worker, is not called."""
    monkeypatch.setattr(functional_module, "sleep", lambda seconds: pytest.fail(f"{seconds} s"))
    app.conf.broker_url = "redis://127.0.0.1:1/0;redis://127.0.0.1:2/0"
    with (
        broker_connection(app, reading=True) as connection,
        pytest.raises(app.connection().recoverable_connection_errors),
    ):
        open_connection(connection)
    assert connection.as_uri().endswith(":2/0")  # the second address was tried too


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_probe_of_silent_broker_ends(scheme, monkeypatch):
    """A broker that accepts connections and never answers fails the probe."""
    monkeypatch.setattr(broker_health, "MAX_WAIT", 0.2)
    monkeypatch.setattr(engine, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}//"
        with Celery(broker=url, set_as_current=False) as app:
            answer = BrokerProbe("celery", app, lambda: ["celery"])()
            assert answer["celery.broker_error"] == "TimeoutError"


def test_worker_without_connection_is_in_trouble():
    """Celery removes a connection that has failed; outside a worker there is none."""
    assert ConsumerWatch(SimpleNamespace(connection=None)).in_trouble()
    assert not ConsumerWatch(None).in_trouble()


def test_kombu_keeps_time_of_request(app):
    """Kombu 5.7 has the attributes that the watch reads."""
    from kombu.transport.redis import Channel

    assert Channel._in_poll is False
    if version("kombu") >= "5.7":
        assert "_brpop_sent_at" in inspect.getsource(Channel)


@pytest.fixture
def functional():
    """kombu.utils.functional, restored at the end of the test."""
    from kombu.utils import functional

    before = functional.sleep
    yield functional
    functional.sleep = before


@pytest.fixture
def builtin_sleep(functional, monkeypatch):
    """Kombu keeps a builtin function, and ``time.sleep`` is patched, as in a gevent worker."""
    functional.sleep = time.monotonic  # a builtin function in each mode
    monkeypatch.setattr(green_kombu, "time", SimpleNamespace(sleep=lambda _seconds: None))


def test_unpatched_sleep_of_kombu_is_found_and_replaced(functional, builtin_sleep):
    """The advice disappears when the function is replaced."""
    engine = CeleryEngine(SimpleNamespace())
    assert "Z4J_GREEN_KOMBU=1" in engine.advice()
    green_kombu.replace_sleep()
    assert functional.sleep is green_kombu.time.sleep
    assert engine.advice() == ""


def test_unpatched_process_needs_no_replacement(functional, monkeypatch):
    """Without gevent both functions are builtin."""
    functional.sleep = time.monotonic
    monkeypatch.setattr(green_kombu, "time", SimpleNamespace(sleep=time.monotonic))
    green_kombu.replace_sleep()
    assert functional.sleep is time.monotonic
    assert CeleryEngine(SimpleNamespace()).advice() == ""


@pytest.mark.parametrize(("value", "replaced"), [("1", True), ("0", False), ("", False)])
def test_setting_replaces_sleep_at_worker_init(
    functional, builtin_sleep, monkeypatch, value, replaced
):
    """``Z4J_GREEN_KOMBU`` is read when Celery sends the signal."""
    monkeypatch.setenv("Z4J_GREEN_KOMBU", value)
    worker_start.replace_kombu_sleep()
    assert (functional.sleep is green_kombu.time.sleep) is replaced
