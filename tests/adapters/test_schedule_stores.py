"""Celery's schedules, static and in Django's database, APScheduler's and rq-scheduler's, as operators see and change them."""

import sqlite3
from contextlib import closing

import pytest
from redis import Redis

from tests.support.schedule_project import (
    MADE,
    MODES,
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


def proven(prove, row, commands, host, *, loop=False):
    """Stop the host, and enter its whole row; ``loop`` says that its tasks have looked for one and seen none."""
    assert host.stop() == 0
    prove(row, "events", "schedules told")
    prove(row, "command", commands)
    prove(row, "clean stop", "SIGTERM, exit code 0")
    if loop:
        prove(row, "loop visible to tasks", "never")


@requires_module("z4j_celerybeat")
def test_celerys_static_schedule(project, prove):
    """Celery's own schedule is known to the brain without its secrets; a trigger runs its task, a resync tells what is new."""
    worker = project.worker("planned", pool="gevent")
    row = project.known("hourly")
    assert (row["scheduler"], row["task_name"], row["expression"], row["args"]) == (
        "celery-beat",
        "e2e.fails_once",
        "3600",
        ["triggered"],
    )
    (other,) = (row for name, row in project.schedules().items() if name != "hourly")
    assert other["name"].startswith("redacted-")
    assert other["kwargs"] == {"x": 3, "y": 4, "api_key": "[REDACTED]"}

    assert project.act("hourly", "trigger")["trigger_result"] == {"status": "success"}
    project.marked()
    with pytest.raises(BrainRefusedError, match="read-only"):
        project.act("hourly", "disable")

    assert project.run("plans", "every other hour")[0] == "SUCCESS"
    project.resync()
    project.known("every other hour", expression="7200")
    log = worker.output()
    assert "not for the brain" not in log
    assert "please report" not in log
    assert project.run("sees_a_loop") == ("SUCCESS", False)
    proven(
        prove,
        ("z4j-celerybeat", "static schedule, gevent worker", "celery"),
        "trigger",
        worker,
        loop=True,
    )


@pytest.mark.long
@requires_module("django_celery_beat")
@pytest.mark.parametrize("pool", POOLS)
def test_django_celery_beat(project, prove, pool):
    """Rows of django-celery-beat are switched, triggered, changed, created and deleted from the brain, in every pool."""
    worker = project.worker("django_beat_app", pool=pool)
    assert project.known("hourly")["source"] == "celery-beat:database"
    project.act("hourly", "trigger")
    project.marked()
    for what, on in (("disable", False), ("enable", True)):
        project.act("hourly", what)
        project.known("hourly", is_enabled=on)
        assert beat_rows(project)["hourly"] == (on, '["triggered"]')
    project.change("update", "celery-beat", "hourly", args=["changed"])
    assert beat_rows(project)["hourly"] == (True, '["changed"]')
    project.act("hourly", "trigger")
    project.marked("changed")
    project.change("create", "celery-beat", **MADE, task_name="e2e.mark", args=["made"])
    assert beat_rows(project)["made"] == (True, '["made"]')
    project.change("delete", "celery-beat", "made")
    project.gone("made")
    assert set(beat_rows(project)) & {"hourly", "made"} == {"hourly"}

    assert project.run("edit", "hourly", enabled=False)[0] == "SUCCESS"
    if pool == "prefork":  # the row was saved in a child, where nobody hears of it
        project.resync()
    project.known("hourly", is_enabled=False)
    log = worker.output()
    for complaint in ("please report", "SynchronousOnlyOperation", "could not be read"):
        assert complaint not in log
    assert project.run("sees_a_loop") == ("SUCCESS", False)
    row = ("z4j-celerybeat", f"rows in Django's database, {pool} worker", "django-celery-beat")
    proven(prove, row, "trigger, disable, enable, create, update, delete", worker, loop=True)


@pytest.mark.long
@requires_module("z4j_apscheduler")
@pytest.mark.parametrize("mode", MODES)
def test_apscheduler(project, prove, mode):
    """Jobs of APScheduler are switched, triggered, changed, created and deleted from the brain, in every mode."""
    with SchedulerHost(project, mode, "apscheduler") as host:
        assert project.known("hourly")["task_name"] == "mark"
        project.act("hourly", "trigger")
        project.marked()
        for what, on in (("disable", False), ("enable", True)):
            project.act("hourly", what)
            assert bool(project.known("hourly", is_enabled=on)["next_run_at"]) is on
        project.change("update", "apscheduler", "hourly", args=["changed"], expression="7200")
        project.known("hourly", expression="7200.0")
        project.act("hourly", "trigger")
        project.marked("changed")
        project.change(
            "create", "apscheduler", **{**MADE, "expression": "1"}, task_name="look", args=["made"]
        )
        project.marked("made")  # the scheduler's own clock runs it, and it has seen no loop
        project.change("delete", "apscheduler", "made")
        project.gone("made")
        row = ("z4j-apscheduler", f"BackgroundScheduler, {mode}", "apscheduler")
        proven(prove, row, "trigger, disable, enable, create, update, delete", host, loop=True)


@pytest.mark.long
@requires_module(
    "rq_scheduler", "its crontab and django-celery-beat's exclude each other: tox -e adapters-rq"
)
@pytest.mark.parametrize("mode", MODES)
def test_rq_scheduler(project, prove, mode):
    """Jobs of rq-scheduler are switched, triggered and deleted from the brain, judged by what Redis then holds."""
    name = "os.getpid [hourly]"
    with (
        closing(Redis.from_url(project.redis_url)) as redis,
        SchedulerHost(project, mode, "rq") as host,
    ):
        project.known(name, queue="default")
        project.act(name, "trigger")
        assert redis.llen("rq:queue:default") == 1
        active = "rq:scheduler:scheduled_jobs"
        for what, on in (("disable", False), ("enable", True)):
            project.act(name, what)
            project.known(name, is_enabled=on)
            assert redis.zcard(active) == on
            assert redis.zcard(f"{active}:z4j-paused") == (not on)
        project.change("delete", "rq-scheduler", name)
        project.gone(name)
        assert redis.zcard(active) == 0
        redis.delete("rq:queue:default")
        proven(
            prove,
            ("z4j-rqscheduler", f"Scheduler, {mode}", "rq-scheduler"),
            "trigger, disable, enable, delete",
            host,
        )


def beat_rows(project):
    """``enabled`` and ``args`` of django-celery-beat's rows, by name."""
    with closing(sqlite3.connect(project.home / "beat.sqlite3")) as connection:
        return {
            name: (bool(enabled), args)
            for name, enabled, args in connection.execute(
                "SELECT name, enabled, args FROM django_celery_beat_periodictask"
            )
        }
