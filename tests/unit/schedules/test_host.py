"""One scheduler adapter, hosted: what it says, what it cannot, how long it may take."""

import asyncio
from types import SimpleNamespace

import pytest
from zope.interface.verify import verifyObject

from tests.support.streams import CONFIG, KEY, StubScheduler, schedule
from z4j_bare.errors import CommandError
from z4j_bare.interfaces import ISchedulerHost
from z4j_bare.schedules.host import SchedulerHost


class Slow(StubScheduler):
    """An adapter whose list needs a loop, and takes its time."""

    seconds = 0.01

    async def list_schedules(self):
        await asyncio.sleep(self.seconds)
        return await super().list_schedules()


@pytest.fixture
def hosted(bridge):
    return lambda scheduler: SchedulerHost(scheduler, bridge, CONFIG)


def test_host_implements_interface(hosted):
    """The host implements ISchedulerHost."""
    assert verifyObject(ISchedulerHost, hosted(StubScheduler()))


def test_host_runs_coroutines_of_adapter(hosted):
    """Coroutines with and without an await return their results in each mode."""
    host = hosted(Slow(schedule("hourly")))
    assert [each.name for each in host.schedules(30)] == ["hourly"]
    assert host.schedule(KEY, 30).name == "hourly"
    assert host.schedule("none", 30) is None
    assert host.invoke("disable_schedule", KEY, timeout=30).status == "success"


def test_hanging_listing_times_out(hosted):
    """A listing that hangs raises ``TimeoutError``, and the next listing works."""
    scheduler = Slow(schedule("hourly"))
    host = hosted(scheduler)
    scheduler.seconds = 60
    with pytest.raises(TimeoutError):
        host.schedules(0.05)
    scheduler.seconds = 0
    assert len(host.schedules(30)) == 1


def test_host_passes_adapter_errors_on(hosted):
    """Errors of the adapter reach the caller, and a missing method raises ``CommandError``."""
    scheduler = StubScheduler()
    scheduler.failure = OSError("no database")
    with pytest.raises(OSError, match="no database"):
        hosted(scheduler).schedules(30)
    with pytest.raises(CommandError, match="beat does not support pause"):
        hosted(scheduler).invoke("pause", timeout=1)


def test_signals_call_changed_until_disconnect(hosted):
    """Each signal calls ``changed`` without arguments. After a disconnect there are no signals."""
    rings = []
    host = hosted(scheduler := StubScheduler())
    host.connect(lambda: rings.append(1))
    scheduler.sink("created", object())
    scheduler.sink("deleted", None)
    assert len(rings) == 2
    host.disconnect()
    assert scheduler.sink is None


def test_failing_adapter_is_logged_and_stays_usable(hosted, caplog):
    """An adapter that fails to connect, to disconnect or to list capabilities stays usable."""
    scheduler = StubScheduler(schedule("hourly"))
    host = hosted(scheduler)
    assert "list" in host.capabilities()
    for name in ("connect_signals", "disconnect_signals", "capabilities"):
        setattr(scheduler, name, lambda *_: 1 / 0)
    host.connect(lambda: None)
    host.disconnect()
    assert "list" in host.capabilities(), "what it said last"
    assert len(host.schedules(30)) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "z4j: could not connect the signals of beat: its changes are published later",
        "z4j: could not disconnect the signals of beat",
    ]


def test_minimal_adapter_is_accepted(hosted, caplog):
    """An adapter without signals and capabilities is accepted without a warning."""
    host = hosted(SimpleNamespace(name="bare"))
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
