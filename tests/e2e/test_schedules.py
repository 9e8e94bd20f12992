"""Schedules of the real schedulers over the brain's REST API, judged by what the scheduler and its tasks then do."""

import sqlite3
import sys
from contextlib import closing
from importlib.util import find_spec

import pytest
from redis import Redis

from tests.e2e.place import APPS, Place
from tests.e2e.plans import MADE, PATIENCE, Operator
from tests.peer import SECRET_TEXT, TOKEN, Peer
from z4j_bare import _process_singleton, install_agent
from z4j_bare.demo import process
from z4j_bare.demo.brain import Brain, free_port
from z4j_bare.demo.process import Service, clean_environment
from z4j_bare.demo.rest import BrainRefusedError

pytestmark = pytest.mark.timeout(240)

MODES = ("threads", "gevent", "eventlet")
POOLS = ("gevent", "eventlet", "threads", "prefork")


def needs(module, why="not installed; tox installs it"):
    """Mark a test that nothing can be said of without ``module``."""
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module}: {why}")


class Plans(Operator, Place):
    """A place whose operator looks after schedules."""

    def marked(self, name="triggered"):
        """Wait for the file that a triggered task leaves, and remove it."""
        process.until((self.home / name).exists, f"the mark {name}", timeout=PATIENCE)
        (self.home / name).unlink()


class Timed(Service):
    """A host with nothing but a scheduler: ``apps/timed.py``, as a context manager; it has a session when it begins."""

    def __init__(self, place, mode, kind):
        self.place = place
        super().__init__(
            f"the {kind} host in {mode}",
            [sys.executable, str(APPS / "timed.py"), mode, kind],
            environment={**clean_environment(), **place.environment()},
            cwd=place.home,
            log=place.home / "host.log",
        )

    def __enter__(self):
        self.spawn(lambda: bool(self.place.sessions()), PATIENCE)
        return self


@pytest.fixture
def place(brain, redis_url, tmp_path):
    with Plans(brain, redis_url, tmp_path) as here:
        yield here


@needs("z4j_celerybeat")
def test_celerys_static_schedule(place):
    """Celery's own schedule is known to the brain without its secrets; a trigger runs its task, a resync tells what is new."""
    worker = place.worker("planned", pool="gevent")
    row = place.known("hourly")
    assert (row["scheduler"], row["task_name"], row["expression"], row["args"]) == ("celery-beat", "e2e.fails_once", "3600", ["triggered"])
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


@pytest.mark.long
@needs("django_celery_beat")
@pytest.mark.parametrize("pool", POOLS)
def test_django_celery_beat(place, pool):
    """Rows of django-celery-beat are switched, triggered, changed, created and deleted from the brain, in every pool."""
    worker = place.worker("beaten", pool=pool)
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


@pytest.mark.long
@needs("z4j_apscheduler")
@pytest.mark.parametrize("mode", MODES)
def test_apscheduler(place, mode):
    """Jobs of APScheduler are switched, triggered, changed, created and deleted from the brain, in every mode."""
    with Timed(place, mode, "apscheduler"):
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
        place.change("create", "apscheduler", **{**MADE, "expression": "1"}, task_name="mark", args=["made"])
        place.marked("made")  # the scheduler's own clock runs it
        place.change("delete", "apscheduler", "made")
        place.gone("made")


@pytest.mark.long
@needs("rq_scheduler", "its crontab and django-celery-beat's exclude each other: tox -e e2e-rq")
@pytest.mark.parametrize("mode", MODES)
def test_rq_scheduler(place, mode):
    """Jobs of rq-scheduler are switched, triggered and deleted from the brain, judged by what Redis then holds."""
    name = "os.getpid [hourly]"
    with closing(Redis.from_url(place.redis_url)) as redis, Timed(place, mode, "rq"):
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


@pytest.mark.long
@needs("z4j_scheduler")
@pytest.mark.parametrize("pool", POOLS)
def test_fires_of_z4js_own_scheduler(redis_url, tmp_path, pool):
    """What z4j-scheduler finds due is enqueued by the worker's agent, each time once, and its task runs."""
    environment = {"Z4J_EMBEDDED_SCHEDULER": "true", "Z4J_SCHEDULER_BIND_PORT": str(free_port())}
    with Brain(tmp_path / "brain", environment=environment) as brain, Plans(brain, redis_url, tmp_path) as place:
        place.worker("planned", pool=pool)
        place.known("hourly")
        made = brain.post(
            f"/projects/{place.project}/schedules",
            name="often", engine="celery", kind="interval", expression="2", task_name="e2e.add", args=[20, 3], kwargs={},
        )  # fmt: skip

        def fired():
            rows = [row for row in brain.commands(place.project) if row["action"] == "schedule.fire"]
            return rows if len([row for row in rows if row["status"] == "completed"]) >= 3 else None

        done = [row["result"]["task_id"] for row in process.until(fired, "three fires", timeout=60) if row["status"] == "completed"]
        assert len(set(done)) == len(done)
        assert {place.outcome(task) for task in done} == {("SUCCESS", 23)}
        fires = brain.get(f"/projects/{place.project}/schedules/{made['id']}/fires")
        assert len({fire["fire_id"] for fire in fires}) == len(fires)
        assert [fire["error_code"] for fire in fires if fire["error_code"]] == []


@pytest.mark.long
@needs("z4j_celerybeat")
def test_the_next_process_tells_them(place):
    """One process tells a scheduler's schedules; when it has ended, the next one that connects does, and takes the orders."""
    first = place.worker("planned", pool="gevent", name="w1@place")
    place.known("hourly")
    second = place.worker("planned", pool="gevent", name="w2@place")
    assert first.stop() == 0
    assert activations(place) == 1
    third = place.worker("planned", pool="gevent", name="w3@place")
    process.until(lambda: activations(place) == 2, "the second epoch", timeout=PATIENCE)
    place.act("hourly", "trigger")
    place.marked()
    for worker in (second, third):
        assert "no ack for schedules" not in worker.output()


@pytest.mark.long
@needs("z4j_apscheduler")
def test_what_rest_cannot_emit(seam, until, monkeypatch):
    """The actions of older brains, each delivered twice, reach APScheduler once; a scripted peer sends them."""
    from apscheduler.schedulers.background import BackgroundScheduler
    from z4j_apscheduler import APSchedulerAdapter

    monkeypatch.setenv("Z4J_FLUSH_SECONDS", "0.5")
    ran = []
    scheduler = BackgroundScheduler(timezone="UTC")
    scheduler.add_job(ran.append, "interval", hours=1, args=[1], id="hourly", name="hourly")
    scheduler.start()
    peer = Peer(seam)
    options = {"brain_url": peer.url, "token": TOKEN, "project_id": "demo", "hmac_secret": SECRET_TEXT}
    runtime = install_agent(engines=[], schedulers=[APSchedulerAdapter(scheduler=scheduler)], **options)
    try:
        until(lambda: peer.last and peer.last.frames)

        def order(action):
            identity = peer.last.command(f"schedule.{action}", {"schedule_id": "hourly"}, target={"scheduler": "apscheduler"})
            results = until(lambda: [frame for frame in peer.frames("command_result") if frame.id == identity])
            peer.last.command(f"schedule.{action}", {"schedule_id": "hourly"}, identity=identity)
            again = until(lambda: [frame for frame in peer.frames("command_result") if frame.id == identity][1:])
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


def activations(place):
    """How often a process was asked for the schedules, and has told them."""
    rows = place.brain.commands(place.project, status="completed")
    return len([row for row in rows if row["action"] == "schedule.external.activate"])


def beat_rows(place):
    """``enabled`` and ``args`` of django-celery-beat's rows, by name."""
    with closing(sqlite3.connect(place.home / "beat.sqlite3")) as connection:
        return {
            name: (bool(enabled), args)
            for name, enabled, args in connection.execute("SELECT name, enabled, args FROM django_celery_beat_periodictask")
        }
