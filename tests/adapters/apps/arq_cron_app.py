"""An arq worker with a cron job that operators change; its adapter requires the worker object."""

import os

import sample_tasks
from arq import cron, func
from arq.connections import RedisSettings
from arq.worker import Worker
from z4j_arqcron import ArqCronAdapter

from z4j_bare import NativeScheduleControl, install_agent


async def nightly(_context):
    await sample_tasks.checks_loop_async(1)


async def add(_context, x, y):
    return await sample_tasks.add_async(x, y)


def main():
    functions = [func(nightly, name="nightly")]
    if "WITHOUT_ADD" not in os.environ:
        functions.append(func(add, name="add"))
    worker = Worker(
        functions=functions,
        cron_jobs=[cron(nightly, name="nightly", hour=3, minute=0, second=0)],
        redis_settings=RedisSettings.from_dsn(os.environ["REDIS_URL"]),
        poll_delay=0.05,
    )
    control = NativeScheduleControl(os.path.join(os.environ["Z4J_HOME"], "arq-schedules.sqlite"))
    install_agent(engines=[], schedulers=[ArqCronAdapter(worker=worker, control=control)])
    worker.run()


if __name__ == "__main__":
    main()
