"""Changes of schedules in Celery beat, Django's database, APScheduler and rq-scheduler."""

import sqlite3
from contextlib import closing

import pytest
from redis import Redis

from tests.support.schedule_project import (
    MODES,
    NEW_SCHEDULE,
    ScheduleProject,
    SchedulerHost,
    requires_module,
)
from z4j_bare.demo.rest import BrainRefusedError

pytestmark = pytest.mark.timeout(240)

POOLS = ("gevent", "eventlet", "threads", "prefork")


@pytest.fixture
def project(brain, redis_url, tmp_path):
    with ScheduleProject(brain, redis_url, tmp_path) as here:
        yield here


def stop_and_prove(prove, row, commands, host, *, loop=False):
    """Stop the host and add its row to the table.

    :param loop: whether its tasks have checked for a visible loop and found none.
    """
    assert host.stop() == 0
    prove(row, "events", "schedules reported")
    prove(row, "command", commands)
    prove(row, "clean stop", "SIGTERM, exit code 0")
    if loop:
        prove(row, "loop visible to tasks", "never")


@requires_module("z4j_celerybeat")
def test_static_celery_schedule_is_published_and_triggered(project, prove):
    """Celery's schedule arrives without secrets; a trigger runs it, a resync sends new entries."""
    worker = project.worker("scheduled", pool="gevent")
    row = project.wait_schedule("hourly")
    assert (row["scheduler"], row["task_name"], row["expression"], row["args"]) == (
        "celery-beat",
        "e2e.fails_once",
        "3600",
        ["triggered"],
    )
    (other,) = (row for name, row in project.schedules().items() if name != "hourly")
    assert other["name"].startswith("redacted-")
    assert other["kwargs"] == {"x": 3, "y": 4, "api_key": "[REDACTED]"}

    assert project.control("hourly", "trigger")["trigger_result"] == {"status": "success"}
    project.wait_mark()
    with pytest.raises(BrainRefusedError, match="read-only"):
        project.control("hourly", "disable")

    assert project.run("add_schedule", "every other hour")[0] == "SUCCESS"
    project.resync()
    project.wait_schedule("every other hour", expression="7200")
    log = worker.output()
    assert "not for the brain" not in log
    assert "please report" not in log
    assert project.run("sees_a_loop") == ("SUCCESS", False)
    stop_and_prove(
        prove,
        ("z4j-celerybeat", "static schedule, gevent worker", "celery"),
        "trigger",
        worker,
        loop=True,
    )


@pytest.mark.long
@requires_module("django_celery_beat")
@pytest.mark.parametrize("pool", POOLS)
def test_operator_changes_django_celery_beat(project, prove, pool):
    """Rows are enabled, disabled, triggered, updated, created and deleted, in each pool."""
    worker = project.worker("django_beat_app", pool=pool)
    assert project.wait_schedule("hourly")["source"] == "celery-beat:database"
    project.control("hourly", "trigger")
    project.wait_mark()
    for what, on in (("disable", False), ("enable", True)):
        project.control("hourly", what)
        project.wait_schedule("hourly", is_enabled=on)
        assert beat_rows(project)["hourly"] == (on, '["triggered"]')
    project.change("update", "celery-beat", "hourly", args=["changed"])
    assert beat_rows(project)["hourly"] == (True, '["changed"]')
    project.control("hourly", "trigger")
    project.wait_mark("changed")
    project.change("create", "celery-beat", **NEW_SCHEDULE, task_name="e2e.mark", args=["made"])
    assert beat_rows(project)["made"] == (True, '["made"]')
    project.change("delete", "celery-beat", "made")
    project.wait_deleted("made")
    assert set(beat_rows(project)) & {"hourly", "made"} == {"hourly"}

    assert project.run("edit", "hourly", enabled=False)[0] == "SUCCESS"
    if pool == "prefork":  # The agent does not see a change in a child.
        project.resync()
    project.wait_schedule("hourly", is_enabled=False)
    log = worker.output()
    for complaint in ("please report", "SynchronousOnlyOperation", "could not read the schedules"):
        assert complaint not in log
    assert project.run("sees_a_loop") == ("SUCCESS", False)
    row = ("z4j-celerybeat", f"rows in Django's database, {pool} worker", "django-celery-beat")
    stop_and_prove(
        prove, row, "trigger, disable, enable, create, update, delete", worker, loop=True
    )


@pytest.mark.long
@requires_module("z4j_apscheduler")
@pytest.mark.parametrize("mode", MODES)
def test_operator_changes_apscheduler(project, prove, mode):
    """Jobs are enabled, disabled, triggered, updated, created and deleted, in each mode."""
    with SchedulerHost(project, mode, "apscheduler") as host:
        assert project.wait_schedule("hourly")["task_name"] == "mark"
        project.control("hourly", "trigger")
        project.wait_mark()
        for what, on in (("disable", False), ("enable", True)):
            project.control("hourly", what)
            assert bool(project.wait_schedule("hourly", is_enabled=on)["next_run_at"]) is on
        project.change("update", "apscheduler", "hourly", args=["changed"], expression="7200")
        project.wait_schedule("hourly", expression="7200.0")
        project.control("hourly", "trigger")
        project.wait_mark("changed")
        project.change(
            "create",
            "apscheduler",
            **{**NEW_SCHEDULE, "expression": "1"},
            task_name="mark_without_loop",
            args=["made"],
        )
        project.wait_mark("made")  # The scheduler ran the task, which saw no loop.
        project.change("delete", "apscheduler", "made")
        project.wait_deleted("made")
        row = ("z4j-apscheduler", f"BackgroundScheduler, {mode}", "apscheduler")
        stop_and_prove(
            prove, row, "trigger, disable, enable, create, update, delete", host, loop=True
        )


@pytest.mark.long
@requires_module(
    "rq_scheduler", "its crontab and django-celery-beat's exclude each other: tox -e adapters-rq"
)
@pytest.mark.parametrize("mode", MODES)
def test_operator_changes_rq_scheduler(project, prove, mode):
    """Jobs are enabled, disabled, triggered and deleted, with their effect in Redis."""
    name = "os.getpid [hourly]"
    with (
        closing(Redis.from_url(project.redis_url)) as redis,
        SchedulerHost(project, mode, "rq") as host,
    ):
        project.wait_schedule(name, queue="default")
        project.control(name, "trigger")
        assert redis.llen("rq:queue:default") == 1
        active = "rq:scheduler:scheduled_jobs"
        for what, on in (("disable", False), ("enable", True)):
            project.control(name, what)
            project.wait_schedule(name, is_enabled=on)
            assert redis.zcard(active) == on
            assert redis.zcard(f"{active}:z4j-paused") == (not on)
        project.change("delete", "rq-scheduler", name)
        project.wait_deleted(name)
        assert redis.zcard(active) == 0
        redis.delete("rq:queue:default")
        stop_and_prove(
            prove,
            ("z4j-rqscheduler", f"Scheduler, {mode}", "rq-scheduler"),
            "trigger, disable, enable, delete",
            host,
        )


def beat_rows(project):
    """Return ``enabled`` and ``args`` of django-celery-beat's rows by name."""
    with closing(sqlite3.connect(project.home / "beat.sqlite3")) as connection:
        return {
            name: (bool(enabled), args)
            for name, enabled, args in connection.execute(
                "SELECT name, enabled, args FROM django_celery_beat_periodictask"
            )
        }
