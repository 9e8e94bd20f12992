"""A worker of arq: ``arq arq_app.WorkerSettings``."""

import asyncio
import os

import sample_tasks
from arq import create_pool, func
from arq.connections import RedisSettings
from z4j_arq import ArqEngineAdapter
from z4j_arq.events import attach_to_worker_settings

from z4j_bare import install_agent

settings = RedisSettings.from_dsn(os.environ["REDIS_URL"])


def task(chore):
    """Return a sample task with arq's signature, which has a context as first parameter."""

    async def run(_context, *args):
        return await chore(*args)

    return func(run, name=chore.__name__.removesuffix("_async"), max_tries=1)


class WorkerSettings:
    functions = [  # noqa: RUF012
        task(each)
        for each in (
            sample_tasks.add_async,
            sample_tasks.fails_async,
            sample_tasks.waits_async,
            sample_tasks.checks_loop_async,
        )
    ]
    redis_settings = settings
    allow_abort_jobs = True
    poll_delay = 0.05
    keep_result = 60
    job_completion_wait = 10  # Without it SIGTERM cancels running jobs.


adapter = ArqEngineAdapter(
    redis_settings=settings, function_names=["add", "fails", "waits", "checks_loop"]
)
attach_to_worker_settings(WorkerSettings, adapter=adapter)


def send(name, args):
    async def enqueue():
        pool = await create_pool(settings)
        job = await pool.enqueue_job(name, *args)
        await pool.aclose()
        return job.job_id

    return asyncio.run(enqueue())


install_agent(engines=[adapter])
