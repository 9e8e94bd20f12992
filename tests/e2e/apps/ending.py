"""A Celery application with an agent, whose tasks end in unusual ways."""

import time
from datetime import datetime, tzinfo

from celery import Task
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject
from sample_tasks import HOME, IO_SECONDS, app
from z4j_celery import CeleryEngineAdapter
from z4j_celery.meta import z4j_meta

from z4j_bare import install_agent


class BrokenBackend(DisabledBackend):
    """A result backend that is away."""

    def mark_as_done(self, *_args, **_kwargs):
        raise ConnectionError("the backend is away")

    mark_as_failure = mark_as_done


@app.task(name="e2e.ignores")
def ignores():
    raise Ignore


@app.task(name="e2e.rejects", acks_late=True)
def rejects():
    raise Reject("poison", requeue=False)


@app.task(name="e2e.requeues", acks_late=True)
def requeues(mark, seconds):
    """Return to the queue until ``seconds`` have passed since the first run."""
    path = HOME / mark
    if not path.exists():
        path.touch()
    if time.time() - path.stat().st_mtime < seconds:
        time.sleep(0.01)
        raise Reject("later", requeue=True)
    return "done"


@app.task(name="e2e.unstored", backend=BrokenBackend(app))
def unstored():
    return "never stored"


@app.task(name="e2e.unstored_failure", backend=BrokenBackend(app))
def unstored_failure():
    raise ValueError("never stored")


@app.task(name="e2e.replaces", bind=True)
def replaces(self, queue):
    raise self.replace(final.si(7).set(queue=queue))


@app.task(name="e2e.final")
@z4j_meta(redact_result=True)
def final(number):
    return number


@app.task(name="e2e.retries_masked", bind=True, max_retries=3)
def retries_masked(self, card, note):
    """Retry once at once."""
    if not self.request.retries:
        raise self.retry(countdown=0, exc=ConnectionError("not yet"))
    return len(card) + len(note)


@app.task(name="e2e.replaces_masked", bind=True)
def replaces_masked(self, *args, **kwargs):
    raise self.replace(retries_masked.s(*args, **kwargs))


class FailingZone(tzinfo):
    """A time zone whose code fails."""

    def utcoffset(self, _moment):
        raise ValueError

    dst = tzname = utcoffset


@app.task(name="e2e.returns_failing_value", ignore_result=True)
def returns_failing_value():
    return {"at": datetime(2026, 1, 2, tzinfo=FailingZone()), "number": 3}


def wait_for(mark):
    """Wait at most ten seconds until the file exists."""
    deadline = time.monotonic() + 10
    while not (HOME / mark).exists() and time.monotonic() < deadline:
        time.sleep(IO_SECONDS)


class SlowlyRetried(Task):
    """A task whose retry is signalled after the start of the next run, if ``overlaps`` is true."""

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        mark, overlaps = args
        if overlaps:
            wait_for(f"{mark}.second")


@app.task(name="e2e.retries_at_once", bind=True, base=SlowlyRetried, max_retries=1)
def retries_at_once(self, mark, _overlaps):
    """Retry once at once. The second run waits for a file."""
    if not self.request.retries:
        raise self.retry(countdown=0, exc=ConnectionError("not yet"))
    (HOME / f"{mark}.second").touch()
    wait_for(f"{mark}.end")
    return "second run"


runtime = install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
