"""A huey consumer with a periodic task that operators change."""

import os

import sample_tasks
from huey import RedisHuey, crontab
from z4j_huey import HueyEngineAdapter
from z4j_hueyperiodic import HueyPeriodicAdapter

from z4j_bare import NativeScheduleControl, install_agent

huey = RedisHuey("matrix", url=os.environ["REDIS_URL"], utc=True)


@huey.periodic_task(crontab(minute="0", hour="3"), name="nightly")
def nightly():
    sample_tasks.checks_loop(1)


if "WITHOUT_ADD" not in os.environ:
    huey.task(name="add")(sample_tasks.add)
control = NativeScheduleControl(os.path.join(os.environ["Z4J_HOME"], "huey-schedules.sqlite"))
install_agent(
    engines=[HueyEngineAdapter(huey=huey)],
    schedulers=[HueyPeriodicAdapter(huey=huey, control=control)],
)
