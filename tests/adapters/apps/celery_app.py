"""Celery's worker with any pool: ``celery -A celery_app worker``."""

import os

import sample_tasks
from celery import Celery
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent

url = os.environ["REDIS_URL"]
app = Celery("matrix", broker=url, backend=url)
app.conf.broker_connection_retry_on_startup = True

for task in (sample_tasks.add, sample_tasks.fails, sample_tasks.waits, sample_tasks.checks_loop):
    app.task(name=task.__name__)(task)


def send(name, args):
    return app.send_task(name, args).id


install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
