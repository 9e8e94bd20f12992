"""A consumer of huey with thread, greenlet or process workers."""

import os

import sample_tasks
from huey import RedisHuey
from z4j_huey import HueyEngineAdapter

from z4j_bare import install_agent, post_fork

huey = RedisHuey("matrix", url=os.environ["REDIS_URL"])
tasks = {
    task.__name__: huey.task(name=task.__name__)(task)
    for task in (sample_tasks.add, sample_tasks.fails, sample_tasks.waits, sample_tasks.checks_loop)
}


@huey.on_startup()
def start_agent():
    """Start an agent in a process worker; does nothing in the consumer's own process."""
    post_fork()


def send(name, args):
    return tasks[name](*args).id


install_agent(engines=[HueyEngineAdapter(huey=huey)])
