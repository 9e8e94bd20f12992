"""Schedules apart from a particular scheduler: ownership, z4j's own scheduler, older actions."""

import pytest

from tests.support.peer import SECRET_TEXT, TOKEN, Peer
from tests.support.schedule_project import (
    MODES,
    TIMEOUT,
    ScheduleProject,
    SchedulerHost,
    requires_module,
)
from z4j_bare import _process_singleton, install_agent
from z4j_bare.demo import process
from z4j_bare.demo.brain import Brain, free_port

pytestmark = pytest.mark.timeout(240)

POOLS = ("gevent", "eventlet", "threads", "prefork")


@pytest.mark.long
@requires_module("z4j_scheduler")
@pytest.mark.parametrize("pool", POOLS)
def test_agent_runs_fires_of_z4j_scheduler(redis_url, tmp_path, pool):
    """A fire of z4j-scheduler is enqueued by the worker's agent exactly once, and its task runs."""
    environment = {"Z4J_EMBEDDED_SCHEDULER": "true", "Z4J_SCHEDULER_BIND_PORT": str(free_port())}
    with (
        Brain(tmp_path / "brain", environment=environment) as brain,
        ScheduleProject(brain, redis_url, tmp_path) as project,
    ):
        project.worker("scheduled", pool=pool)
        project.wait_schedule("hourly")
        made = brain.post(
            f"/projects/{project.slug}/schedules",
            name="often",
            engine="celery",
            kind="interval",
            expression="2",
            task_name="e2e.add",
            args=[20, 3],
            kwargs={},
        )

        def fired():
            rows = [row for row in brain.commands(project.slug) if row["action"] == "schedule.fire"]
            return rows if len([row for row in rows if row["status"] == "completed"]) >= 3 else None

        done = [
            row["result"]["task_id"]
            for row in process.until(fired, "three fires", timeout=60)
            if row["status"] == "completed"
        ]
        assert len(set(done)) == len(done)
        assert {project.outcome(task) for task in done} == {("SUCCESS", 23)}
        fires = brain.get(f"/projects/{project.slug}/schedules/{made['id']}/fires")
        assert len({fire["fire_id"] for fire in fires}) == len(fires)
        assert [fire["error_code"] for fire in fires if fire["error_code"]] == []


@pytest.mark.long
@requires_module("z4j_apscheduler")
@pytest.mark.parametrize("mode", MODES)
def test_adapter_without_mutation_gets_external_control(schedule_project, mode):
    """An adapter that can only enable and disable gets ``schedule.external.control``."""
    project = schedule_project
    with SchedulerHost(project, mode, "enable_only"):
        project.wait_schedule("hourly")
        for what, on in (("disable", False), ("enable", True)):
            done = project.control("hourly", what)
            assert bool(project.wait_schedule("hourly", is_enabled=on)["next_run_at"]) is on
            operation = project.brain.get(
                f"/projects/{project.slug}/schedules/external-control-operations/{done['operation_id']}"
            )
            assert operation["status"] == "APPLIED", operation
        actions = [
            row["action"] for row in project.brain.commands(project.slug, status="completed")
        ]
        assert actions.count("schedule.external.control") == 2


@pytest.mark.long
@requires_module("z4j_celerybeat")
def test_next_process_takes_over_schedules(schedule_project):
    """When the process that publishes the schedules ends, the next one takes over."""
    project = schedule_project
    first = project.worker("scheduled", pool="gevent", name="w1@e2e")
    project.wait_schedule("hourly")
    second = project.worker("scheduled", pool="gevent", name="w2@e2e")
    assert first.stop() == 0
    assert activations(project) == 1
    third = project.worker("scheduled", pool="gevent", name="w3@e2e")
    process.until(lambda: activations(project) == 2, "the second epoch", timeout=TIMEOUT)
    project.control("hourly", "trigger")
    project.wait_mark()
    for worker in (second, third):
        assert "does not acknowledge schedules" not in worker.output()


@pytest.mark.long
@requires_module("z4j_apscheduler")
def test_repeated_old_schedule_actions_run_once(backend, until, monkeypatch):
    """Schedule actions of older brains, delivered twice by a scripted peer, are executed once."""
    from apscheduler.schedulers.background import BackgroundScheduler
    from z4j_apscheduler import APSchedulerAdapter

    monkeypatch.setenv("Z4J_FLUSH_SECONDS", "0.5")
    ran = []
    scheduler = BackgroundScheduler(timezone="UTC")
    scheduler.add_job(ran.append, "interval", hours=1, args=[1], id="hourly", name="hourly")
    scheduler.start()
    peer = Peer(backend)
    options = {
        "brain_url": peer.url,
        "token": TOKEN,
        "project_id": "demo",
        "hmac_secret": SECRET_TEXT,
    }
    runtime = install_agent(
        engines=[], schedulers=[APSchedulerAdapter(scheduler=scheduler)], **options
    )
    try:
        until(lambda: peer.last and peer.last.frames)

        def send_twice(action):
            identity = peer.last.command(
                f"schedule.{action}", {"schedule_id": "hourly"}, target={"scheduler": "apscheduler"}
            )
            results = until(
                lambda: [frame for frame in peer.frames("command_result") if frame.id == identity]
            )
            peer.last.command(f"schedule.{action}", {"schedule_id": "hourly"}, identity=identity)
            repeated = until(
                lambda: [frame for frame in peer.frames("command_result") if frame.id == identity][
                    1:
                ]
            )
            assert repeated[0].payload == results[0].payload
            assert results[0].payload.status == "success", results[0].payload.error

        send_twice("disable")
        assert scheduler.get_job("hourly").next_run_time is None
        send_twice("enable")
        assert scheduler.get_job("hourly").next_run_time is not None
        send_twice("trigger_now")
        until(lambda: ran)
        send_twice("delete")
        assert scheduler.get_job("hourly") is None
        assert ran == [1]
        assert peer.events() == [], "no epoch, no schedules"
        assert peer.errors == []
    finally:
        runtime.stop(timeout=3)
        _process_singleton.clear_runtime(expected=runtime)
        peer.stop()
        scheduler.shutdown()


def activations(project):
    """Return the number of completed requests to publish the schedules."""
    rows = project.brain.commands(project.slug, status="completed")
    return len([row for row in rows if row["action"] == "schedule.external.activate"])
