"""A worker of dramatiq, with threads or with dramatiq-gevent."""

import os

import dramatiq
import sample_tasks
from dramatiq.brokers.redis import RedisBroker
from z4j_dramatiq import DramatiqEngineAdapter

from z4j_bare import install_agent

broker = RedisBroker(url=os.environ["REDIS_URL"])
dramatiq.set_broker(broker)

for task in (sample_tasks.add, sample_tasks.fails, sample_tasks.waits, sample_tasks.checks_loop):
    dramatiq.actor(task, actor_name=task.__name__, max_retries=0)


def send(name, args):
    return broker.get_actor(name).send(*args).message_id


install_agent(engines=[DramatiqEngineAdapter(broker=broker)])
