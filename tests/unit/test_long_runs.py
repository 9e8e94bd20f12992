"""The parts of the benchmarks that decide whether an event was lost."""

import os
import subprocess

import pytest

from benchmarks.soak_hosts import (
    FILLER,
    FULL_SECONDS,
    QUIET_SECONDS,
    Disk,
    account,
    numbers_by_host,
    schedule,
    unexplained,
)
from tests.support.crash_harness import Trial
from tests.support.prefork_crash import (
    POINTS,
    TASKS,
    PreforkDelivery,
    PreforkKill,
    judge,
    plan,
    result_of,
)
from z4j_bare.demo.process import HarnessError


def test_schedule_ends_hosts_in_turn_and_frees_disk():
    """Kills and stops alternate, each full disk is freed, and a run ends without an incident."""
    events = schedule(600.0, drop=20.0, restart=70.0, full=180.0)
    moments = [moment for moment, _ in events]
    assert moments == sorted(moments)
    assert max(moments) <= 600.0 - QUIET_SECONDS
    ends = [what for _, what in events if what in ("kill", "stop")]
    assert ends == ["kill", "stop"] * 4
    filled = [moment for moment, what in events if what == "fill"]
    freed = [moment for moment, what in events if what == "free"]
    assert filled == [180.0, 360.0, 540.0]
    assert freed == [moment + FULL_SECONDS for moment in filled]
    assert [moment for moment, what in events if what == "drop"][:2] == [10.0, 30.0]


def test_schedule_without_intervals_is_empty():
    """Nothing happens in a run without drops, restarts and a full disk."""
    assert schedule(600.0) == []


def sample(**changes):
    return {
        "produced": 12,
        "stored": 9,
        "buffered": 0,
        "lost": {},
        "buffer_durable": True,
        **changes,
    }


def test_events_in_ring_of_killed_host_need_not_arrive():
    """A killed host must deliver what it has stored, and a stopped one what it has recorded."""
    killed = account("t-1", "kill", sample(), range(9))
    stopped = account("t-1", "stop", sample(), range(9))
    assert (killed.expected, killed.missing) == (9, [])
    assert (stopped.expected, stopped.missing) == (12, [9, 10, 11])
    assert unexplained([killed]) == 0
    assert unexplained([stopped]) == 3


def test_buffered_events_are_not_missing():
    """Events that are in a buffer file at the end of a run are counted separately."""
    ended = account("t-1", "stop", sample(), range(6), range(4, 12))
    assert (ended.arrived, ended.buffered, ended.missing) == (6, 6, [])


def test_reported_losses_explain_missing_events():
    """Events may be missing if the process or one that shares its home has reported losses."""
    lossy = account("t-1", "kill", sample(), range(4))
    reporter = account("t-0", "end", sample(lost={"capacity": 3, "ring": 1}), range(12))
    assert unexplained([lossy, reporter]) == 1


def test_rows_in_memory_of_ended_process_may_be_missing():
    """If a process ends while its disk does not work, the rows in its memory are lost."""
    ended = account("t-1", "kill", sample(buffer_durable=False, buffered=5), range(4))
    assert (ended.allowed, unexplained([ended])) == (5, 0)


def test_numbers_of_events_follow_their_tasks_and_kinds():
    """The number of an event is recovered from its task id and kind, and repeated ones count."""
    events = [
        ("threads-0-0", "task.received"),
        ("threads-0-2", "task.started"),
        ("threads-0-2", "task.started"),
        ("gevent-11-1", "task.succeeded"),
    ]
    found = {name: dict(numbers) for name, numbers in numbers_by_host(events).items()}
    assert found == {"threads-0": {0: 1, 7: 2}, "gevent-11": {5: 1}}


def test_filled_disk_has_no_byte_left(tmp_path):
    """The disk is full for any write, and can be freed again."""
    home = tmp_path / "home"
    write = ["sh", "-c", 'printf x > "$0/own"', str(home)]
    try:
        disk = Disk(home)
        disk.__enter__()
    except HarnessError as error:
        pytest.skip(str(error))
    try:
        disk.fill()
        assert subprocess.run(disk.command(write), stderr=subprocess.PIPE).returncode != 0
        disk.free()
        assert subprocess.run(disk.command(write)).returncode == 0
        assert os.listdir(disk.outside) == ["own"]
        assert FILLER not in os.listdir(home)
    finally:
        disk.__exit__()
    assert os.listdir(home) == [], "the disk is only visible in its namespace"


def test_plan_kills_at_each_place_of_each_point():
    """Each place before, inside and after a call of the channel has its trial."""
    trials = plan(sum(POINTS.values()))
    places = {(trial.point, trial.statement) for trial in trials}
    assert places == {(point, place) for point, number in POINTS.items() for place in range(number)}


TRIAL = Trial("p0-0000", events=3 * TASKS, point="write")
SUCCEEDED = ["task.received", "task.started", "task.succeeded"]


def faults_of(row, kinds=SUCCEEDED, *, parent=False, ended=(4,), number=4):
    delivery = PreforkDelivery()
    kill = PreforkKill(TRIAL, True, parent, 0, [], [number], list(ended))
    judge(delivery, kill, number, row, kinds)
    return delivery.faults


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"state": "success", "result": result_of(5)}, SUCCEEDED),
        ({"state": "success", "result": result_of(4)[:-1]}, SUCCEEDED),
        ({"state": "started"}, SUCCEEDED[:2]),
        ({"state": "failure", "exception": "ValueError"}, SUCCEEDED),
        ({"state": "success", "result": result_of(4)}, [*SUCCEEDED, "task.failed"]),
    ],
    ids=["another result", "part of a result", "no end", "wrong exception", "two ends"],
)
@pytest.mark.parametrize("parent", [False, True], ids=["child", "parent"])
def test_untrue_task_of_killed_worker_is_a_fault(parent, row, kinds):
    """A wrong or truncated value, a second end and a run without an end are found."""
    assert len(faults_of(row, kinds, parent=parent)) == 1


def test_success_of_unfinished_task_is_a_fault():
    """A success is untrue if the task never reached its end."""
    assert faults_of({"state": "success", "result": result_of(4)}, ended=())


def test_only_killed_parent_may_lose_task():
    """A task without a row or an end in the queue is a fault, unless the parent was killed."""
    for row in (None, {"state": "received"}):
        assert faults_of(row, ["task.received"])
        assert not faults_of(row, ["task.received"], parent=True)


def test_true_tasks_of_killed_worker_are_no_faults():
    """A success with its result and a lost run are true."""
    assert not faults_of({"state": "success", "result": result_of(4)})
    assert not faults_of({"state": "failure", "exception": "WorkerLostError"}, ["task.failed"])
    assert not faults_of({"state": "success", "result": None}, parent=True)
