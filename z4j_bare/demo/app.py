"""The demo's Celery application, which installs the agent like an application of a user.

Only the worker imports this module. The demo's script sends the tasks by name.
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

#: Simulated I/O time of a task, in seconds.
IO_SECONDS = 0.01

#: Pause of ``demo.long`` between two checks of its deadline, in seconds.
STEP_SECONDS = 0.1

app = Celery("z4j_demo")
app.conf.update(broker.settings_from_environment())


class LoggedTask(Task):  # type: ignore[misc]  # Celery has no types
    """A task that logs the end and the outcome of each of its runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task and log its outcome."""
        outcome = task_log.RETURNED
        try:
            return super().__call__(*args, **kwargs)
        except BaseException as exc:  # A cancelled run ends with GreenletExit.
            outcome = type(exc).__name__
            raise
        finally:
            task_log.write(HOME, self.request.id, outcome)


app.Task = LoggedTask


@app.task(name="demo.plain")
def plain(number: int) -> str:
    """Sleep for 10 ms, as if for I/O. Return whether a running event loop is visible, as text."""
    time.sleep(IO_SECONDS)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return f"{number}: no running loop"
    return f"{number}: a running loop is visible"


@app.task(name="demo.failing")
def failing() -> None:
    """Raise ``ValueError`` in every run."""
    raise ValueError("this demo task always fails")


@app.task(name="demo.retrying", bind=True, max_retries=1)
def retrying(self: Task) -> int:
    """Fail in the first run, and succeed in the retry one second later."""
    retries = int(self.request.retries)
    if not retries:
        raise self.retry(countdown=1, exc=ConnectionError("this demo task is retried once"))
    return retries


@app.task(name="demo.fails_once")
def fails_once(mark: str) -> str:
    """Succeed if the file ``mark`` exists; otherwise create the file and fail.

    So the first run fails, and the run after an operator's retry succeeds.
    """
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return "succeeded in the retry"
    raise ConnectionError("this demo task fails until an operator retries it")


@app.task(name="demo.uses_asyncio")
def uses_asyncio() -> str:
    """Call ``asyncio.run``, which raises ``RuntimeError`` if a running loop is visible."""

    async def work() -> str:
        await asyncio.sleep(IO_SECONDS)
        return "asyncio.run returned"

    return asyncio.run(work())


@app.task(name="demo.long")
def long(seconds: float) -> str:
    """Sleep for ``seconds`` in steps of 0.1 s, unless an operator cancels the task earlier."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(STEP_SECONDS)
    return "not cancelled"


if importlib.util.find_spec("django"):
    from z4j_bare.demo import orm

    visit_model = orm.create_model(HOME)

    @app.task(name="demo.uses_orm")
    def uses_orm() -> int:
        """Insert a row and count the rows with Django's ORM."""
        return orm.record_visit(visit_model)


install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
