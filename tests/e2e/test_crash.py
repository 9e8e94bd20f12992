"""Killed processes: the brain receives their committed events once and in order."""

import os
import signal
import time
from contextlib import contextmanager

import pytest

from tests.support import prefork_crash
from tests.support.crash_harness import POINTS, CrashHarness, key, plan, verify
from tests.support.peer import PROJECT, SECRET_TEXT, TOKEN, Peer
from z4j_bare.buffer.report import read_report
from z4j_bare.concurrency.threads import ThreadsConcurrency
from z4j_bare.demo.process import until
from z4j_bare.demo.rest import Credentials

pytestmark = pytest.mark.timeout(180)

MODES = ("threads", "gevent", "eventlet")

#: Tasks of the killed worker.
TASKS = 120

#: Hosts that are killed per mode.
TRIALS = 20

#: Events that each host records.
EVENTS = 60

#: Maximum time from the next worker's readiness to the first adopted row in the brain, in seconds.
#: The guarantee is 5 s, which ``benchmarks crash --compare`` measures; the test machine is shared.
FIRST_ROW_TIMEOUT = 40.0


@contextmanager
def stopped_after(peer):
    try:
        yield peer
    finally:
        peer.stop()


#: The modes with the database of the brain that is stopped.
VARIANTS = (
    ("threads", "sqlite"),
    ("eventlet", "sqlite"),
    ("gevent", "postgresql"),
    pytest.param("gevent", "sqlite", marks=pytest.mark.long),
    pytest.param("threads", "postgresql", marks=pytest.mark.long),
    pytest.param("eventlet", "postgresql", marks=pytest.mark.long),
)


@pytest.fixture(scope="module")
def database(request):
    return request.param


@pytest.fixture(scope="module")
def brain(database, make_brain, tmp_path_factory):
    """A brain that only this module uses, because it is stopped."""
    with make_brain(database, tmp_path_factory.mktemp("brain")) as running:
        yield running


def buffered(home):
    """Return the number of rows in all stores, read while their owners use them."""
    return sum(read_report(path).total for path in home.glob("**/z4j-green-*.sqlite"))


@pytest.mark.parametrize(("pool", "database"), VARIANTS, indirect=["database"])
def test_next_worker_sends_events_of_killed_worker(pool, fresh_project, capsys):
    """The next worker sends the events of a worker that was killed during an outage."""
    project = fresh_project
    worker = project.worker(pool=pool, name="w1@e2e")
    project.warm_up()
    until(lambda: not buffered(project.home), "the deletion of acknowledged rows", timeout=20)
    project.brain.stop()
    ids = [project.send("add", number, 1) for number in range(TASKS)]
    assert {project.outcome(task_id)[0] for task_id in ids} == {"SUCCESS"}
    # Three events of each task are committed, a flush interval after the last task at the latest.
    until(lambda: buffered(project.home) >= 3 * TASKS, "the commit of all events", timeout=20)
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not worker.running, "the worker's end", timeout=10)
    rows = buffered(project.home)
    project.brain.start()
    project.worker(pool=pool, name="w2@e2e")
    began = time.monotonic()

    def known():
        return {
            row["task_id"] for row in project.brain.tasks(project.slug) if row["state"] == "success"
        }

    until(lambda: known() & set(ids), "the first task", timeout=FIRST_ROW_TIMEOUT, interval=0.1)
    first = time.monotonic() - began
    until(lambda: known().issuperset(ids), "all tasks", timeout=90, interval=0.2)
    last = time.monotonic() - began
    for task_id in ids[:: TASKS // 6]:
        assert project.kinds(task_id) == ["task.received", "task.started", "task.succeeded"]
    until(
        lambda: len(list(project.home.glob("**/z4j-green-*.sqlite"))) == 1,
        "the deletion of the orphaned file",
        timeout=20,
    )
    reports = project.brain.get(f"/projects/{project.slug}/agents/{project.agent.agent_id}/health")
    assert len({report["worker_id"] for report in reports}) == 2, "a report of each worker"
    assert {report["telemetry_loss"]["event_records"] for report in reports} == {0}
    with capsys.disabled():
        print(
            f"\n{pool}, {rows} rows: first task {first:.1f} s and last task {last:.1f} s "
            "after the next worker was ready"
        )


@pytest.mark.parametrize(("mode", "database"), VARIANTS, indirect=["database"])
def test_committed_events_of_killed_hosts_arrive_once(
    mode, brain, agent_credentials, tmp_path, capsys
):
    """Hosts are killed in each phase; the next host sends each committed event exactly once."""
    agent = agent_credentials()
    with CrashHarness(mode, agent, tmp_path) as harness:
        kills = [harness.kill(trial) for trial in plan(TRIALS, EVENTS)]
        harness.upload_rest()
    rows = {row["task_id"]: row for row in brain.tasks(agent.project)}
    deliveries = [verify(brain, agent.project, kill, rows) for kill in kills]
    assert [kill for kill in kills if kill.corrupt] == []
    assert [delivery.faults for delivery in deliveries] == [[]] * TRIALS
    reached = {kill.trial.point for kill in kills if kill.reached}
    assert reached == set(POINTS), "the phases in which hosts were killed"
    assert sum(kill.reached for kill in kills) >= TRIALS * 3 // 4
    with capsys.disabled():
        committed = sum(kill.committed for kill in kills)
        arrived = sum(delivery.received for delivery in deliveries)
        print(
            f"\n{mode}: {committed} events known to be committed, {arrived} arrived, "
            f"{sum(kill.reached for kill in kills)} hosts killed at their point"
        )


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_tasks_of_killed_prefork_processes_have_true_ends(
    database, brain, agent_credentials, redis_url, tmp_path
):
    """A child or the parent is killed at each call of the channel: no task stays started, no
    result is damaged, and no end is lost or reported twice.
    """
    agent = agent_credentials()
    trials = prefork_crash.plan(sum(prefork_crash.POINTS.values()))
    # The place of the kill in each call: between the writes, before, before, after and before it.
    chosen = [trials[index] for index in (1, 3, 5, 8, 9)]
    with prefork_crash.PreforkHarness(agent, tmp_path, redis_url) as harness:
        kills = [harness.kill(trial) for trial in chosen]
        harness.upload_rest()
    rows = {row["task_id"]: row for row in brain.tasks(agent.project)}
    deliveries = [prefork_crash.verify(brain, agent.project, kill, rows) for kill in kills]
    assert [kill for kill in kills if kill.corrupt] == []
    assert [delivery.faults for delivery in deliveries] == [[]] * len(chosen)
    assert any(kill.reached for kill in kills if kill.parent)
    assert any(kill.reached for kill in kills if not kill.parent)


@pytest.mark.parametrize("mode", MODES)
def test_events_of_killed_hosts_arrive_in_order(mode, tmp_path):
    """A peer receives the committed events of each killed host in the order of their recording."""
    with stopped_after(Peer(ThreadsConcurrency())) as peer:
        agent = Credentials(peer.url, PROJECT, "", TOKEN, SECRET_TEXT)
        with CrashHarness(mode, agent, tmp_path) as harness:
            kills = [harness.kill(trial) for trial in plan(len(POINTS), EVENTS, seed=1)]
            harness.upload_rest()
        arrived = list(dict.fromkeys((event["task_id"], event["kind"]) for event in peer.events()))
        assert peer.errors == []
    for kill in kills:
        own = [each for each in arrived if each[0].startswith(kill.trial.name)]
        assert own == [key(kill.trial, number) for number in range(len(own))]
        assert len(own) >= kill.committed
