"""The host of one scheduler adapter: calls, errors, timeouts and redaction."""

import asyncio
from types import SimpleNamespace

import pytest
from zope.interface.verify import verifyObject

from tests.support.streams import CONFIG, KEY, StubScheduler, schedule
from z4j_bare.errors import CommandError
from z4j_bare.interfaces import ISchedulerHost
from z4j_bare.schedules.host import SchedulerHost


class SlowScheduler(StubScheduler):
    """An adapter whose listing awaits and takes ``seconds``."""

    seconds = 0.01

    async def list_schedules(self):
        await asyncio.sleep(self.seconds)
        return await super().list_schedules()


@pytest.fixture
def make_host(bridge):
    return lambda scheduler: SchedulerHost(scheduler, bridge, CONFIG)


def test_host_implements_interface(make_host):
    """The host implements ISchedulerHost."""
    assert verifyObject(ISchedulerHost, make_host(StubScheduler()))


def test_host_runs_coroutines_of_adapter(make_host):
    """Coroutines with and without an await return their results in each mode."""
    host = make_host(SlowScheduler(schedule("hourly")))
    assert [each.name for each in host.schedules(30)] == ["hourly"]
    assert host.schedule(KEY, 30).name == "hourly"
    assert host.schedule("none", 30) is None
    assert host.invoke("disable_schedule", KEY, timeout=30).status == "success"


def test_hanging_listing_times_out(make_host):
    """A listing that hangs raises ``TimeoutError``, and the next listing works."""
    scheduler = SlowScheduler(schedule("hourly"))
    host = make_host(scheduler)
    scheduler.seconds = 60
    with pytest.raises(TimeoutError):
        host.schedules(0.05)
    scheduler.seconds = 0
    assert len(host.schedules(30)) == 1


def test_host_passes_adapter_errors_on(make_host):
    """Errors of the adapter reach the caller, and a missing method raises ``CommandError``."""
    scheduler = StubScheduler()
    scheduler.failure = OSError("no database")
    with pytest.raises(OSError, match="no database"):
        make_host(scheduler).schedules(30)
    with pytest.raises(CommandError, match="beat does not support pause"):
        make_host(scheduler).invoke("pause", timeout=1)


def test_signals_call_changed_until_disconnect(make_host):
    """Each signal calls ``changed`` without arguments. After a disconnect there are no signals."""
    rings = []
    host = make_host(scheduler := StubScheduler())
    host.connect(lambda: rings.append(1))
    scheduler.sink("created", object())
    scheduler.sink("deleted", None)
    assert len(rings) == 2
    host.disconnect()
    assert scheduler.sink is None


def test_failing_adapter_is_logged_and_stays_usable(make_host, caplog):
    """An adapter that fails to connect, to disconnect or to list capabilities stays usable."""
    scheduler = StubScheduler(schedule("hourly"))
    host = make_host(scheduler)
    assert "list" in host.capabilities()
    for name in ("connect_signals", "disconnect_signals", "capabilities"):
        setattr(scheduler, name, lambda *_: 1 / 0)
    host.connect(lambda: None)
    host.disconnect()
    assert "list" in host.capabilities(), "the previous capabilities"
    assert len(host.schedules(30)) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "z4j: could not connect the signals of beat: changes are published only periodically",
        "z4j: could not disconnect the signals of beat",
    ]


def test_minimal_adapter_is_accepted(make_host, caplog):
    """An adapter without signals and capabilities is accepted without a warning."""
    host = make_host(SimpleNamespace(name="bare"))
    host.connect(lambda: None)
    host.disconnect()
    assert host.capabilities() == []
    assert caplog.records == []


def test_redactor_uses_configured_patterns(bridge):
    """The configured patterns apply in addition to the brain's defaults."""
    config = SimpleNamespace(
        redaction_extra_key_patterns=("shoe_size",),
        redaction_extra_value_patterns=(),
        max_payload_bytes=100,
    )
    host = SchedulerHost(StubScheduler(), bridge, config)
    assert host.redactor.scrub({"shoe_size": 1, "token": 2}) == {
        "shoe_size": "[REDACTED]",
        "token": "[REDACTED]",
    }
    assert len(host.redactor.scrub("x" * 5000)) < 200
