"""A worker of taskiq: ``taskiq worker taskiq_app:broker``."""

import asyncio
import os

import sample_tasks
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend
from z4j_taskiq import TaskiqEngineAdapter, attach_to_broker

from z4j_bare import install_agent

url = os.environ["REDIS_URL"]
broker = ListQueueBroker(url).with_result_backend(RedisAsyncResultBackend(url))
tasks = {
    each.__name__.removesuffix("_async"): broker.task(
        task_name=each.__name__.removesuffix("_async")
    )(each)
    for each in (
        sample_tasks.add_async,
        sample_tasks.fails_async,
        sample_tasks.waits_async,
        sample_tasks.checks_loop_async,
    )
}
adapter = TaskiqEngineAdapter(broker=broker)
attach_to_broker(broker, adapter=adapter)


def send(name, args):
    async def kick():
        await broker.startup()
        task = await tasks[name].kiq(*args)
        await broker.shutdown()
        return task.task_id

    return asyncio.run(kick())


install_agent(engines=[adapter])
