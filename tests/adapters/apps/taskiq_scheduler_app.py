"""A taskiq scheduler with a labelled task that operators change, and an in-memory broker."""

import asyncio
import os

import sample_tasks
from taskiq import InMemoryBroker, TaskiqScheduler
from taskiq.api import run_scheduler_task
from taskiq.schedule_sources import LabelScheduleSource
from z4j_taskiqscheduler import TaskiqSchedulerAdapter

from z4j_bare import NativeScheduleControl, install_agent

broker = InMemoryBroker()


@broker.task(task_name="nightly", schedule=[{"cron": "0 3 * * *"}])
async def nightly():
    await sample_tasks.checks_loop_async(1)


if "WITHOUT_ADD" not in os.environ:
    broker.task(task_name="add")(sample_tasks.add_async)


async def main():
    source = LabelScheduleSource(broker)
    await broker.startup()
    await source.startup()
    control = NativeScheduleControl(os.path.join(os.environ["Z4J_HOME"], "taskiq-schedules.sqlite"))
    adapter = TaskiqSchedulerAdapter(
        source=source, source_loop=asyncio.get_running_loop(), control=control
    )
    install_agent(engines=[], schedulers=[adapter])
    await run_scheduler_task(TaskiqScheduler(broker, [source]))


if __name__ == "__main__":
    asyncio.run(main())
