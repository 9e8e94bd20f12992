"""Celery's schedules, static and in Django's database, APScheduler's and rq-scheduler's, as operators see and change them."""

import sqlite3
from contextlib import closing

import pytest
from redis import Redis

from tests.support.schedule_project import MADE, MODES, Plans, Timed, needs
from z4j_bare.demo.rest import BrainRefusedError

pytestmark = pytest.mark.timeout(240)

POOLS = ("gevent", "eventlet", "threads", "prefork")


@pytest.fixture
def place(brain, redis_url, tmp_path):
    with Plans(brain, redis_url, tmp_path) as here:
        yield here


def proven(prove, row, commands, host, *, loop=False):
    """Stop the host, and enter its whole row; ``loop`` says that its tasks have looked for one and seen none."""
    assert host.stop() == 0
    prove(row, "events", "schedules told")
    prove(row, "command", commands)
    prove(row, "clean stop", "SIGTERM, exit code 0")
    if loop:
        prove(row, "loop visible to tasks", "never")


@needs("z4j_celerybeat")
def test_celerys_static_schedule(place, prove):
    """Celery's own schedule is known to the brain without its secrets; a trigger runs its task, a resync tells what is new."""
    worker = place.worker("planned", pool="gevent")
    row = place.known("hourly")
    assert (row["scheduler"], row["task_name"], row["expression"], row["args"]) == (
        "celery-beat",
        "e2e.fails_once",
        "3600",
        ["triggered"],
    )
    (other,) = (row for name, row in place.schedules().items() if name != "hourly")
    assert other["name"].startswith("redacted-")
    assert other["kwargs"] == {"x": 3, "y": 4, "api_key": "[REDACTED]"}

    assert place.act("hourly", "trigger")["trigger_result"] == {"status": "success"}
    place.marked()
    with pytest.raises(BrainRefusedError, match="read-only"):
        place.act("hourly", "disable")

    assert place.run("plans", "every other hour")[0] == "SUCCESS"
    place.resync()
    place.known("every other hour", expression="7200")
    log = worker.output()
    assert "not for the brain" not in log
    assert "please report" not in log
    assert place.run("sees_a_loop") == ("SUCCESS", False)
    proven(
        prove,
        ("z4j-celerybeat", "static schedule, gevent worker", "celery"),
        "trigger",
        worker,
        loop=True,
    )


@pytest.mark.long
@needs("django_celery_beat")
@pytest.mark.parametrize("pool", POOLS)
def test_django_celery_beat(place, prove, pool):
    """Rows of django-celery-beat are switched, triggered, changed, created and deleted from the brain, in every pool."""
    worker = place.worker("django_beat_app", pool=pool)
    assert place.known("hourly")["source"] == "celery-beat:database"
    place.act("hourly", "trigger")
    place.marked()
    for what, on in (("disable", False), ("enable", True)):
        place.act("hourly", what)
        place.known("hourly", is_enabled=on)
        assert beat_rows(place)["hourly"] == (on, '["triggered"]')
    place.change("update", "celery-beat", "hourly", args=["changed"])
    assert beat_rows(place)["hourly"] == (True, '["changed"]')
    place.act("hourly", "trigger")
    place.marked("changed")
    place.change("create", "celery-beat", **MADE, task_name="e2e.mark", args=["made"])
    assert beat_rows(place)["made"] == (True, '["made"]')
    place.change("delete", "celery-beat", "made")
    place.gone("made")
    assert set(beat_rows(place)) & {"hourly", "made"} == {"hourly"}

    assert place.run("edit", "hourly", enabled=False)[0] == "SUCCESS"
    if pool == "prefork":  # the row was saved in a child, where nobody hears of it
        place.resync()
    place.known("hourly", is_enabled=False)
    log = worker.output()
    for complaint in ("please report", "SynchronousOnlyOperation", "could not be read"):
        assert complaint not in log
    assert place.run("sees_a_loop") == ("SUCCESS", False)
    row = ("z4j-celerybeat", f"rows in Django's database, {pool} worker", "django-celery-beat")
    proven(prove, row, "trigger, disable, enable, create, update, delete", worker, loop=True)


@pytest.mark.long
@needs("z4j_apscheduler")
@pytest.mark.parametrize("mode", MODES)
def test_apscheduler(place, prove, mode):
    """Jobs of APScheduler are switched, triggered, changed, created and deleted from the brain, in every mode."""
    with Timed(place, mode, "apscheduler") as host:
        assert place.known("hourly")["task_name"] == "mark"
        place.act("hourly", "trigger")
        place.marked()
        for what, on in (("disable", False), ("enable", True)):
            place.act("hourly", what)
            assert bool(place.known("hourly", is_enabled=on)["next_run_at"]) is on
        place.change("update", "apscheduler", "hourly", args=["changed"], expression="7200")
        place.known("hourly", expression="7200.0")
        place.act("hourly", "trigger")
        place.marked("changed")
        place.change(
            "create", "apscheduler", **{**MADE, "expression": "1"}, task_name="look", args=["made"]
        )
        place.marked("made")  # the scheduler's own clock runs it, and it has seen no loop
        place.change("delete", "apscheduler", "made")
        place.gone("made")
        row = ("z4j-apscheduler", f"BackgroundScheduler, {mode}", "apscheduler")
        proven(prove, row, "trigger, disable, enable, create, update, delete", host, loop=True)


@pytest.mark.long
@needs(
    "rq_scheduler", "its crontab and django-celery-beat's exclude each other: tox -e adapters-rq"
)
@pytest.mark.parametrize("mode", MODES)
def test_rq_scheduler(place, prove, mode):
    """Jobs of rq-scheduler are switched, triggered and deleted from the brain, judged by what Redis then holds."""
    name = "os.getpid [hourly]"
    with closing(Redis.from_url(place.redis_url)) as redis, Timed(place, mode, "rq") as host:
        place.known(name, queue="default")
        place.act(name, "trigger")
        assert redis.llen("rq:queue:default") == 1
        active = "rq:scheduler:scheduled_jobs"
        for what, on in (("disable", False), ("enable", True)):
            place.act(name, what)
            place.known(name, is_enabled=on)
            assert redis.zcard(active) == on
            assert redis.zcard(f"{active}:z4j-paused") == (not on)
        place.change("delete", "rq-scheduler", name)
        place.gone(name)
        assert redis.zcard(active) == 0
        redis.delete("rq:queue:default")
        proven(
            prove,
            ("z4j-rqscheduler", f"Scheduler, {mode}", "rq-scheduler"),
            "trigger, disable, enable, delete",
            host,
        )


def beat_rows(place):
    """``enabled`` and ``args`` of django-celery-beat's rows, by name."""
    with closing(sqlite3.connect(place.home / "beat.sqlite3")) as connection:
        return {
            name: (bool(enabled), args)
            for name, enabled, args in connection.execute(
                "SELECT name, enabled, args FROM django_celery_beat_periodictask"
            )
        }
