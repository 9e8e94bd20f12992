"""Tasks that take, return and raise odd values."""

import os
from pathlib import Path

from celery import Celery
from kombu import Queue
from z4j_celery import CeleryEngineAdapter

from tests.support.odd_values import NAMES, QUEUES, TEXTS, VALUES
from z4j_bare import install_agent
from z4j_bare.demo import broker

app = Celery("odd_app")
app.conf.update(broker.settings_from_environment())
app.conf.result_backend = os.environ[broker.BROKER]
own_queue = Path(os.environ[broker.HOME]).name
app.conf.task_queues = [Queue(name) for name in (own_queue, *QUEUES.values())]


@app.task(name="odd.takes")
def takes(*_args, **_kwargs):
    return None


@app.task(name="odd.returns")
def returns(name):
    return VALUES[name]


@app.task(name="odd.raises")
def raises(name):
    raise ValueError(TEXTS[name])


@app.task(name="odd.retries", bind=True, max_retries=1)
def retries(self, name):
    """Retry once, and succeed."""
    if not self.request.retries:
        raise self.retry(countdown=0.1, exc=ValueError(TEXTS[name]))


def named():
    """Run under each of the odd names."""


for odd_name in NAMES.values():
    app.task(name=odd_name)(named)

runtime = install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
