"""One project in the brain, one broker's corner, and the workers in it: what a test module shares."""

import os
import sys
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

import z4j_bare
from z4j_bare.demo import broker
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.rest import BrainRefusedError
from z4j_bare.demo.worker import Worker

APPS = Path(__file__).parents[1] / "e2e" / "apps"
FINISHED = frozenset({"success", "failure", "revoked"})
PATIENCE = 40.0


class E2EProject:
    """A project with one agent, and a producer of its tasks.

    ``home`` is a new directory; its name is the queue's. As a context manager it stops its workers at the end.
    """

    def __init__(self, brain, redis_url, home):
        self.brain = brain
        self.home = home
        self.redis_url = (
            redis_url.rpartition("/")[0] + "/1"
        )  # the demo's tests look at what is left in the first
        self.slug = f"p-{uuid.uuid4().hex[:12]}"
        self._stack = ExitStack()

    def __enter__(self):
        self.brain.create_project(self.slug)
        self.agent = self.brain.mint_agent(self.slug, "agent")
        self.producer = self._stack.enter_context(broker.producer(self.home, self.redis_url))
        self.producer.conf.result_backend = (
            self.redis_url
        )  # one write per result: files can be read half written
        return self

    def __exit__(self, *exc):
        self._stack.__exit__(*exc)
        with suppress(
            BrainRefusedError
        ):  # one that still digests answers 500; nobody else uses this project
            self.brain.archive_project(self.slug)

    def environment(self, *, agent=True, **extra):
        """Return the variables that the apps need, with the agent's unless ``agent`` is false."""
        path = os.pathsep.join((str(APPS), str(Path(z4j_bare.__file__).parents[1])))
        variables = {**broker.environment(self.home, self.redis_url), "PYTHONPATH": path}
        if agent:
            variables.update(self.agent.env(self.home / "agent"))
        return {**variables, **extra}

    def worker(self, app="installed", *, pool, name="w@e2e", agent=True, environment=None, **how):
        """Start a worker and return it; it consumes."""
        log = self.home / f"{name}.log"
        env = self.environment(agent=agent, **(environment or {}))
        worker = Worker(app, pool=pool, log=log, environment=env, name=name, **how)
        worker.command[
            1:3
        ] = []  # the script of that name, as z4j_celery's own start knows no ``python -m celery``
        worker.command[0] = str(Path(sys.executable).with_name("celery"))
        self._stack.enter_context(worker)
        worker.start()
        return worker

    def send(self, name, *args, queue=None, **kwargs):
        """Send ``e2e.<name>`` and return the task's id."""
        return str(self.producer.send_task(f"e2e.{name}", args=args, kwargs=kwargs, queue=queue).id)

    def outcome(self, task_id, timeout=PATIENCE):
        """Return ``(state, result)`` from Celery's own result backend, once there is one."""
        result = self.producer.AsyncResult(task_id)
        until(result.ready, f"the end of task {task_id}", timeout=timeout)
        return result.state, result.result

    def run(self, name, *args, **kwargs):
        """Send a task and return its outcome."""
        return self.outcome(self.send(name, *args, **kwargs))

    def row(self, task_id, state=None, timeout=PATIENCE):
        """Return the brain's row of a task once it is in ``state``; ``None`` means any final state.

        The error tells what the brain has instead, and what Celery itself says of the task.
        """
        row = None

        def there():
            nonlocal row
            row = self.brain.task(self.slug, "celery", task_id)
            return row if row and row["state"] in ({state} if state else FINISHED) else None

        try:
            return until(
                there,
                f"a row of task {task_id} in state {state or 'final'}",
                timeout=timeout,
                interval=0.1,
            )
        except HarnessError as error:
            kinds, celery = self.kinds(task_id), self.producer.AsyncResult(task_id)
            raise HarnessError(
                f"{error}: events {kinds}, row {row}, Celery says {celery.state} {celery.result!r}"
            ) from None

    def kinds(self, task_id):
        """Return the kinds of a task's events, sorted: the brain keeps their times to the second."""
        return sorted(event["kind"] for event in self.brain.events(self.slug, "celery", task_id))

    def warm_up(self, queue=None, timeout=PATIENCE):
        """Send tasks until the brain shows one whole: prefork's broker events are switched on a second late."""
        sent = []

        def whole():
            sent.append(self.send("add", 0, 0, queue=queue))
            row = self.brain.task(self.slug, "celery", sent[max(0, len(sent) - 3)])
            return row and row["state"] == "success" and row["started_at"]

        until(whole, "a whole row", timeout=timeout, interval=0.5)

    def sessions(self):
        """Return which processes said hello, and when each did last."""
        return {
            row["worker_id"]: row["last_connect_at"] for row in self.brain.agent_workers(self.slug)
        }
