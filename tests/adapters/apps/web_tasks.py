"""The Celery application of a web process, which sends tasks and runs some itself."""

import os

import sample_tasks
from celery import Celery

app = Celery("web", broker=os.environ["REDIS_URL"])
app.conf.broker_connection_retry_on_startup = True


@app.task(name="add")
def add(x, y):
    return sample_tasks.add(x, y)
