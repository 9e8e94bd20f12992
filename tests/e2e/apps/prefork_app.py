"""Tasks that end in ways which only a prefork worker has, with the agent."""

import os
import signal
import time
from pathlib import Path

from celery import Celery, Task
from celery.exceptions import Reject
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent
from z4j_bare.demo import broker

HOME = Path(os.environ[broker.HOME])

app = Celery("prefork_app")
app.conf.update(broker.settings_from_environment())
app.conf.result_backend = os.environ["BACKEND"]
app.conf.worker_pool_restarts = True
app.conf.worker_pool_start_method = os.environ.get("START_METHOD", "fork")
runtime = install_agent(engines=[CeleryEngineAdapter(celery_app=app)])


def kill_child():
    """Send SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


class KilledAfterSuccess(Task):
    """A task whose process is killed after its result has been stored."""

    def on_success(self, *_args):
        kill_child()


@app.task(name="e2e.add")
def add(x, y):
    return {"sum": x + y, "api_key": "hunter2"}


@app.task(name="e2e.silent", send_events=False)
def silent():
    return "silent"


@app.task(name="e2e.naps")
def naps(seconds):
    time.sleep(seconds)
    return "rested"


@app.task(name="e2e.hangs", time_limit=1)
def hangs():
    time.sleep(60)


@app.task(name="e2e.killed")
def killed():
    kill_child()


@app.task(name="e2e.rejects")
def rejects():
    raise Reject("unwanted", requeue=False)


@app.task(name="e2e.killed_once", acks_late=True, reject_on_worker_lost=True)
def killed_once():
    mark = HOME / "killed.once"
    if mark.exists():
        return "second run"
    mark.touch()
    return kill_child()


@app.task(name="e2e.stored", base=KilledAfterSuccess, acks_late=True)
def stored():
    return "stored"
