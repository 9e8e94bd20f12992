"""The demo's Celery application, with the agent in it the way a user puts it there.

The module is imported by the worker only: the script on the other side sends tasks by name.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent
from z4j_bare.demo import broker, task_log

HOME = Path(os.environ[broker.HOME])

app = Celery("z4j_demo")
app.conf.update(broker.settings_from_environment())


class LoggedTask(Task):  # type: ignore[misc]  # Celery has no types
    """A task that writes down when each of its runs ended, and how."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task."""
        outcome = task_log.RETURNED
        try:
            return super().__call__(*args, **kwargs)
        except BaseException as exc:  # GreenletExit too: that is how a cancelled run ends
            outcome = type(exc).__name__
            raise
        finally:
            task_log.write(HOME, self.request.id, outcome)


app.Task = LoggedTask


@app.task(name="demo.plain")
def plain(number: int) -> str:
    """Wait 10 ms, as a task that asks somebody something does; report whether a running loop is visible."""
    time.sleep(0.01)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return f"{number}: no running loop"
    return f"{number}: a running loop is visible"


@app.task(name="demo.failing")
def failing() -> None:
    """Fail."""
    raise ValueError("the demo wants this one to fail")


@app.task(name="demo.retrying", bind=True, max_retries=1)
def retrying(self: Task) -> int:
    """Fail at the first run, come back after a second, succeed."""
    retries = int(self.request.retries)
    if not retries:
        raise self.retry(countdown=1, exc=ConnectionError("the demo wants one retry"))
    return retries


@app.task(name="demo.fails_once")
def fails_once(mark: str) -> str:
    """Fail unless the file ``mark`` is there, and leave it: an operator's retry succeeds."""
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return "succeeded for the operator"
    raise ConnectionError("the demo wants an operator to retry this one")


@app.task(name="demo.uses_asyncio")
def uses_asyncio() -> str:
    """Run a coroutine; raises ``RuntimeError`` where a running loop is visible."""

    async def work() -> str:
        await asyncio.sleep(0.01)
        return "asyncio.run returned"

    return asyncio.run(work())


@app.task(name="demo.long")
def long(seconds: float) -> str:
    """Work in steps of 0.1 s, for an operator to cancel."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
    return "nobody cancelled it"


if importlib.util.find_spec("django"):
    from z4j_bare.demo import orm

    visit = orm.create_model(HOME)

    @app.task(name="demo.uses_orm")
    def uses_orm() -> int:
        """Write and read through Django's ORM."""
        return orm.record_visit(visit)


install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
