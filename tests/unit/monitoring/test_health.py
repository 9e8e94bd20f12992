"""The schedule of health checks and what the heartbeat reports of them, in virtual time."""

import logging
from types import SimpleNamespace

import pytest

from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.engines.engine import HealthProbe
from z4j_bare.monitoring.health import BrokerLog, HealthLoop


class DirectBridge:
    """Runs a blocking check in the caller's task."""

    def call(self, function, *args, timeout=None):
        del timeout
        return function(*args)


class BrokerHarness:
    """A health loop with one check, whose broker can be away."""

    def __init__(self, *, watched=True):
        self.backend = FakeConcurrency()
        self.away = self.suspect = False
        self.connected = True
        self.asked = []
        self.changes = []
        probe = HealthProbe(self.check, self.failed, self.is_suspect if watched else None)
        host = SimpleNamespace(
            description=SimpleNamespace(make_probes=lambda _consumer: [probe]),
        )
        self.loop = HealthLoop({"celery": host}, DirectBridge(), self.backend, None)
        self.loop.on_change = lambda: self.changes.append(self.backend.now())
        self.backend.spawn(self.loop.run, self.backend.event(), name="z4j-health")

    def is_suspect(self):
        return self.suspect or self.away or not self.connected

    def check(self):
        self.asked.append(self.backend.now())
        self.connected = not self.away
        if self.away:
            raise ConnectionRefusedError
        return {
            "celery.broker_connected": "True",
            "celery.broker_error": "",
            "celery.queue_depths": '{"q": 7}',
        }

    def failed(self, error):
        return {
            "celery.broker_connected": "False",
            "celery.broker_error": type(error).__name__,
        }


@pytest.mark.parametrize("watched", [True, False])
def test_broker_is_asked_every_twenty_seconds_while_all_is_well(watched):
    """Watching a worker's own connection causes no further check."""
    harness = BrokerHarness(watched=watched)
    harness.backend.advance(201)
    assert len(harness.asked) == 11
    assert harness.changes == []


@pytest.mark.parametrize("second", range(40, 62, 3))
def test_lost_broker_is_reported_within_ten_seconds(second):
    """The change is announced, with its cause, whenever the broker goes away."""
    harness = BrokerHarness()
    harness.backend.advance(second)
    harness.away = True
    harness.backend.advance(7)
    assert harness.loop.latest() == {
        "celery.broker_connected": "False",
        "celery.broker_error": "ConnectionRefusedError",
    }, "the depths of a broker that is away are not reported"
    assert len(harness.changes) == 1
    harness.away = False
    harness.backend.advance(7)
    assert harness.loop.latest()["celery.queue_depths"] == '{"q": 7}'
    assert harness.loop.latest()["celery.broker_error"] == ""
    assert len(harness.changes) == 2


def test_late_answer_causes_a_check_soon():
    """If a check ends after its timeout, the next check follows soon and reports its result."""
    harness = BrokerHarness()
    harness.backend.advance(1)
    harness.away = True
    harness.backend.advance(7)
    harness.away = False
    harness.connected = True  # the interval after a check that ended late
    harness.backend.advance(7)
    assert harness.loop.latest()["celery.broker_connected"] == "True"


def test_outage_is_logged_at_begin_and_end(caplog):
    """One warning names each error that is a minute apart, and one line the end."""
    caplog.set_level(logging.INFO, "z4j.runtime.monitoring.health")
    backend = FakeConcurrency()
    log = BrokerLog(backend.now)
    for error, seconds in (("", 1), ("A", 1), ("A", 30), ("B", 30), ("B", 90), ("", 1), ("", 1)):
        log.update(
            {"celery.broker_connected": str(error == ""), "celery.broker_error": error, "rq.x": ""}
        )
        backend.advance(seconds)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(", so")[0] for line in lines] == [
        "z4j: celery: the broker cannot be reached (A)",
        "z4j: celery: the broker cannot be reached (B)",
        "z4j: celery: the broker answers again",
    ]


def test_flapping_broker_has_one_warning_a_minute(caplog):
    """A broker that fails every few seconds causes two lines a minute at most."""
    caplog.set_level(logging.INFO, "z4j.runtime.monitoring.health")
    backend = FakeConcurrency()
    log = BrokerLog(backend.now)
    for number in range(150):
        log.update({"celery.broker_connected": str(bool(number % 2)), "celery.broker_error": "A"})
        backend.advance(4)
    assert len(caplog.records) <= 22


def test_suspicion_that_lasts_causes_a_check_every_few_seconds():
    """While the worker reconnects, the broker is asked every 4 s or more."""
    harness = BrokerHarness()
    harness.backend.advance(1)
    harness.suspect = True
    harness.backend.advance(60)
    assert 10 <= len(harness.asked) <= 16
    assert harness.changes == []


def test_error_of_check_is_not_reported_after_success():
    """``<engine>.error`` of an adapter's check goes with its next success."""
    backend, results = FakeConcurrency(), [{"rq.error": "health check failed"}, {"rq.ok": "1"}]
    host = SimpleNamespace(
        description=SimpleNamespace(make_probes=lambda _consumer: []),
        health=lambda _timeout: results.pop(0) if len(results) > 1 else results[0],
    )
    loop = HealthLoop({"rq": host}, DirectBridge(), backend, None)
    backend.spawn(loop.run, backend.event(), name="z4j-health")
    backend.advance(1)
    assert loop.latest() == {"rq.error": "health check failed"}
    backend.advance(30)
    assert loop.latest() == {"rq.ok": "1"}
