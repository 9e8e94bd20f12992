"""Configuration of RQ's worker: ``rq worker -c rq_app``."""

import os

from redis import Redis
from rq import Queue
from z4j_rq import register_worker_bootstrap

REDIS_URL = os.environ["REDIS_URL"]


def send(name, args):
    with Redis.from_url(REDIS_URL) as connection:
        return Queue("default", connection=connection).enqueue(f"sample_tasks.{name}", *args).id


register_worker_bootstrap()
