"""A Celery application without an agent, with a task for each property that an agent must keep."""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from asgiref.sync import async_to_sync
from celery import Celery
from loop_check import sees_a_loop
from z4j_celery.meta import z4j_meta

from z4j_bare.demo import broker, orm

HOME = Path(os.environ[broker.HOME])

#: Duration of ``add``, in seconds.
ADD_SECONDS = 0.02

#: Duration of a wait for I/O in other tasks, in seconds.
IO_SECONDS = 0.05

#: Time in which a copied gevent greenlet would wake in a child, in seconds.
CHILD_SECONDS = 0.5

app = Celery("sample_tasks")
app.conf.update(broker.settings_from_environment())
app.conf.result_backend = os.environ["BACKEND"]
if "RABBITMQ_SETTINGS" in os.environ:
    app.conf.update(json.loads(os.environ["RABBITMQ_SETTINGS"]))


@app.task(name="e2e.add")
def add(x, y, **_kwargs):
    """Take 20 ms and return the sum."""
    time.sleep(ADD_SECONDS)
    return x + y


@app.task(name="e2e.pid")
def pid(_number=0):
    return os.getpid()


@app.task(name="e2e.wait")
def wait(seconds):
    """Create a file while the task runs, and another one when it has ended in any way."""
    started, ended = HOME / "wait.started", HOME / "wait.ended"
    ended.unlink(missing_ok=True)
    started.touch()
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(IO_SECONDS)
    finally:
        ended.touch()
        started.unlink()
    return "waited"


@app.task(name="e2e.fails")
def fails(text):
    raise ValueError(text)


@app.task(name="e2e.retries", bind=True, max_retries=3)
def retries(self):
    """Retry twice and succeed."""
    if self.request.retries < 2:
        raise self.retry(countdown=0.3, exc=ConnectionError("not yet"))
    return self.request.retries


@app.task(name="e2e.retries_later", bind=True)
def retries_later(self):
    # The queue has no consumer. In the task's own queue a worker would receive it at once.
    raise self.retry(countdown=3600, queue="unread", exc=ConnectionError("later"))


@app.task(name="e2e.fails_once")
def fails_once(mark):
    """Create the file and fail; succeed if the file exists."""
    try:
        (HOME / mark).touch(exist_ok=False)
    except FileExistsError:
        return "succeeded"
    raise ConnectionError("once")


@app.task(name="e2e.keeps")
@z4j_meta(keep_kwargs=["amount"], priority="high")
def keeps(*_args, **_kwargs):
    return "kept"


@app.task(name="e2e.hides")
@z4j_meta(redact_kwargs=["customer"], redact_result=True)
def hides(**_kwargs):
    return "a private result"


@app.task(name="e2e.skipped")
@z4j_meta(skip=True)
def skipped():
    return "skipped"


@app.task(name="e2e.unsampled")
@z4j_meta(sample_rate=0.0)
def unsampled():
    return "unsampled"


@app.task(name="e2e.takes")
def takes(text, numbers):
    return [len(text), len(numbers)]


@app.task(name="e2e.returns")
def returns(size):
    return "r" * size


app.task(name="e2e.sees_a_loop")(sees_a_loop)


@app.task(name="e2e.runs_asyncio")
def runs_asyncio():
    async def work():
        await asyncio.sleep(IO_SECONDS)
        return "asyncio"

    return asyncio.run(work())


@app.task(name="e2e.runs_asgiref")
def runs_asgiref():
    async def work():
        await asyncio.sleep(IO_SECONDS)
        return "asgiref"

    return async_to_sync(work)()


# A directory of its own, because several processes import this module.
visit_model = orm.create_model(Path(tempfile.mkdtemp(dir=HOME)))


@app.task(name="e2e.runs_orm")
def runs_orm():
    return orm.record_visit(visit_model)


def in_child(mark):
    """Run a task in a forked child; under gevent also wait until copied greenlets would wake.

    Under eventlet a child that yields runs copies of Celery's greenlets on the parent's epoll.
    """
    returns.apply(args=(1,), task_id=f"{mark}-in-child")
    if "gevent" in sys.modules:
        time.sleep(CHILD_SECONDS)


@app.task(name="e2e.forks")
def forks(mark):
    """Fork, run a task in the child, and return its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            in_child(mark)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in_child_and_exit(mark):
    """Run a task and exit immediately.

    The regular exit of multiprocessing fails in a Celery worker, with or without an agent.
    """
    in_child(mark)
    os._exit(0)


@app.task(name="e2e.multiprocesses")
def multiprocesses(mark):
    """Run a task in a ``multiprocessing`` child and return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=run_in_child_and_exit, args=(mark,))
    child.start()
    child.join()
    return child.exitcode


@app.task(name="e2e.subprocesses")
def subprocesses():
    return subprocess.run(
        [sys.executable, "-c", "print('child')"], capture_output=True, text=True, check=True
    ).stdout
