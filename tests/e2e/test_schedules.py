"""What is no single scheduler's: who tells of schedules, the fires of z4j's own, orders that no published adapter is sent."""

import pytest

from tests.support.peer import SECRET_TEXT, TOKEN, Peer
from tests.support.schedule_project import (
    MODES,
    PATIENCE,
    ScheduleProject,
    SchedulerHost,
    requires_module,
)
from z4j_bare import _process_singleton, install_agent
from z4j_bare.demo import process
from z4j_bare.demo.brain import Brain, free_port

pytestmark = pytest.mark.timeout(240)

POOLS = ("gevent", "eventlet", "threads", "prefork")


@pytest.fixture
def project(brain, redis_url, tmp_path):
    with ScheduleProject(brain, redis_url, tmp_path) as here:
        yield here


@pytest.mark.long
@requires_module("z4j_scheduler")
@pytest.mark.parametrize("pool", POOLS)
def test_fires_of_z4js_own_scheduler(redis_url, tmp_path, pool):
    """What z4j-scheduler finds due is enqueued by the worker's agent, each time once, and its task runs."""
    environment = {"Z4J_EMBEDDED_SCHEDULER": "true", "Z4J_SCHEDULER_BIND_PORT": str(free_port())}
    with (
        Brain(tmp_path / "brain", environment=environment) as brain,
        ScheduleProject(brain, redis_url, tmp_path) as project,
    ):
        project.worker("planned", pool=pool)
        project.known("hourly")
        made = brain.post(
            f"/projects/{project.slug}/schedules",
            name="often", engine="celery", kind="interval", expression="2", task_name="e2e.add", args=[20, 3], kwargs={},
        )  # fmt: skip

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
def test_switches_without_mutation(project, mode):
    """An adapter that can only switch schedules on and off is sent ``schedule.external.control``, and does it."""
    with SchedulerHost(project, mode, "switched"):
        project.known("hourly")
        for what, on in (("disable", False), ("enable", True)):
            done = project.act("hourly", what)
            assert bool(project.known("hourly", is_enabled=on)["next_run_at"]) is on
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
def test_the_next_process_tells_them(project):
    """One process tells a scheduler's schedules; when it has ended, the next one that connects does, and takes the orders."""
    first = project.worker("planned", pool="gevent", name="w1@e2e")
    project.known("hourly")
    second = project.worker("planned", pool="gevent", name="w2@e2e")
    assert first.stop() == 0
    assert activations(project) == 1
    third = project.worker("planned", pool="gevent", name="w3@e2e")
    process.until(lambda: activations(project) == 2, "the second epoch", timeout=PATIENCE)
    project.act("hourly", "trigger")
    project.marked()
    for worker in (second, third):
        assert "no ack for schedules" not in worker.output()


@pytest.mark.long
@requires_module("z4j_apscheduler")
def test_what_rest_cannot_emit(backend, until, monkeypatch):
    """The actions of older brains, each delivered twice, reach APScheduler once; a scripted peer sends them."""
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

        def order(action):
            identity = peer.last.command(
                f"schedule.{action}", {"schedule_id": "hourly"}, target={"scheduler": "apscheduler"}
            )
            results = until(
                lambda: [frame for frame in peer.frames("command_result") if frame.id == identity]
            )
            peer.last.command(f"schedule.{action}", {"schedule_id": "hourly"}, identity=identity)
            again = until(
                lambda: [frame for frame in peer.frames("command_result") if frame.id == identity][
                    1:
                ]
            )
            assert again[0].payload == results[0].payload
            assert results[0].payload.status == "success", results[0].payload.error

        order("disable")
        assert scheduler.get_job("hourly").next_run_time is None
        order("enable")
        assert scheduler.get_job("hourly").next_run_time is not None
        order("trigger_now")
        until(lambda: ran)
        order("delete")
        assert scheduler.get_job("hourly") is None
        assert ran == [1]
        assert peer.events() == [], "no epoch, no schedules"
        assert peer.mishaps == []
    finally:
        runtime.stop(timeout=3)
        _process_singleton.clear_runtime(expected=runtime)
        peer.stop()
        scheduler.shutdown()


def activations(project):
    """How often a process was asked for the schedules, and has told them."""
    rows = project.brain.commands(project.slug, status="completed")
    return len([row for row in rows if row["action"] == "schedule.external.activate"])
