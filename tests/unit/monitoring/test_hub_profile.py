"""The profile of the code that holds the hub."""

import re
import time

import pytest

from tests.unit.monitoring.test_hub_lag import unpatched_sleep
from z4j_bare.concurrency.stacks import Position
from z4j_bare.monitoring.holds import UNSAMPLED, Hold, HoldTable, Sample
from z4j_bare.monitoring.hub_profile import HubProfile


def sample(at, function="spin", task="shop.pay[1]"):
    stack = (Position("/srv/pay.py", 8, "pay", function, ()),)
    return Sample(at, stack, task)


def test_sample_stands_for_time_since_previous_one():
    """A hold with one sample belongs to it whole; several samples share a hold by their times."""
    table = HoldTable()
    table.add(Hold(10.0, 10.54, [sample(10.54, "compute")]))
    table.add(Hold(20.0, 21.0, [sample(20.25, "compute"), sample(20.5, "wait")]))
    rows = {row["place"].rpartition(" ")[2]: row for row in table.rows()}
    assert rows["compute"]["total_seconds"] == pytest.approx(0.79)
    assert rows["wait"]["total_seconds"] == pytest.approx(0.75)
    assert [row["place"].rpartition(" ")[2] for row in table.rows()] == ["compute", "wait"]


def test_many_short_steps_differ_from_one_holder():
    """If several greenlets ran in a hold, it is not a hold by one greenlet."""
    table = HoldTable()
    table.add(Hold(0.0, 0.4, [sample(0.1 * n, task=f"shop.pay[{n}]") for n in range(1, 5)]))
    rows = table.rows()
    assert {(row["holds"], row["single_holds"]) for row in rows} == {(1, 0)}
    assert sum(row["total_seconds"] for row in rows) == pytest.approx(0.4)
    assert max(row["longest_seconds"] for row in rows) == pytest.approx(0.1)


def test_unsampled_hold_is_counted():
    """A hold without a sample is listed, because its time is lost to the tasks all the same."""
    table = HoldTable()
    table.add(Hold(0.0, 0.4, []))
    (row,) = table.rows()
    assert (row["place"], row["task"]) == (UNSAMPLED, None)


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def keep_interpreter_lock(seconds):
    """Call one C function that keeps the interpreter lock; repeat it until the time is over."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        re.match(r"(a*)*b", "a" * 22)


def test_profile_weighs_blockers_by_their_time(backend, mode, until):
    """An unpatched sleep, a loop and a C function that keeps the lock get their times."""
    if mode == "threads":
        pytest.skip("there is no hub to hold")
    blocking_sleep = unpatched_sleep(mode)

    def sleep_unpatched(seconds):
        blocking_sleep(seconds)

    profile = HubProfile(backend, backend.native_ident(), 30.0, str)
    held = {}
    for function in (sleep_unpatched, spin, keep_interpreter_lock):
        held[function.__name__] = 0.0
        for _ in range(3):
            backend.sleep(0.05)
            start = time.perf_counter()
            function(0.3)
            held[function.__name__] += time.perf_counter() - start
    backend.sleep(0.05)
    profile.seconds = 0.0
    until(lambda: not profile.is_running())
    table, stacks = HoldTable(), {}
    for hold in profile.holds:
        table.add(hold)
        profile.add_stacks(stacks, hold)
    rows = {row["place"].rpartition(" ")[2].rpartition(".")[2]: row for row in table.rows()}
    for name, seconds in held.items():
        assert rows[name]["total_seconds"] == pytest.approx(seconds, rel=0.3)
        assert rows[name]["single_holds"] == rows[name]["holds"] >= 3
        found = sum(value for text, value in stacks.items() if name in text)
        assert found == pytest.approx(seconds, rel=0.3)


def test_profile_ends_by_itself(backend, mode, until):
    """The profile stops its timer and its native thread after its seconds."""
    if mode == "threads":
        pytest.skip("there is no hub to hold")
    profile = HubProfile(backend, backend.native_ident(), 0.05, str)
    until(lambda: not profile.is_running())
