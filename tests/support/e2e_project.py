"""A project in the brain with Celery workers, for the end-to-end tests."""

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

#: Timeout of each awaited condition, in seconds.
TIMEOUT = 40.0


class E2EProject:
    """A project with one agent, and a producer of its tasks.

    As a context manager it kills its workers at the end.

    :param redis_url: the Redis server of the results, and of the messages without ``broker_url``.
    :param home: a new directory, whose name is also the queue's name.
    """

    def __init__(self, brain, redis_url, home, broker_url=None):
        self.brain = brain
        self.home = home
        # The tests of the demo check the keys in database 0.
        self.redis_url = redis_url.rpartition("/")[0] + "/1"
        self.broker_url = broker_url
        self.slug = f"p-{uuid.uuid4().hex[:12]}"
        self._stack = ExitStack()

    def __enter__(self):
        self.brain.create_project(self.slug)
        self.agent = self.brain.mint_agent(self.slug, "agent")
        self.producer = self._stack.enter_context(
            broker.producer(self.home, self.broker_url or self.redis_url)
        )
        # Redis stores a result in one write; a result file may be read before it is complete.
        self.producer.conf.result_backend = self.redis_url
        return self

    def __exit__(self, *exc):
        self._stack.__exit__(*exc)
        # A brain that is busy with its database returns 500; no other test uses this project.
        with suppress(BrainRefusedError):
            self.brain.archive_project(self.slug)

    def environment(self, *, agent=True, **extra):
        """Return the environment of the apps; it includes the agent's unless ``agent`` is false."""
        path = os.pathsep.join((str(APPS), str(Path(z4j_bare.__file__).parents[1])))
        variables = {
            **broker.environment(self.home, self.broker_url or self.redis_url),
            "BACKEND": self.redis_url,
            "PYTHONPATH": path,
        }
        if agent:
            variables.update(self.agent.env(self.home / "agent"))
        return {**variables, **extra}

    def worker(
        self,
        app="installed",
        *,
        pool,
        name="w@e2e",
        agent=True,
        environment=None,
        mingle=False,
        **options,
    ):
        """Start a worker, wait until it consumes messages, and return it."""
        log = self.home / f"{name}.log"
        env = self.environment(agent=agent, **(environment or {}))
        worker = Worker(app, pool=pool, log=log, environment=env, name=name, **options)
        # Most workers in production are started by the script.
        worker.command[:3] = [str(Path(sys.executable).with_name("celery"))]
        if not mingle and "--without-mingle" not in worker.command:
            worker.command.append("--without-mingle")  # asking other workers takes a second
        # A test that is about a worker's end stops the worker itself. At the end of all other tests
        # a regular stop would only take time.
        self._stack.callback(worker.kill)
        worker.start()
        return worker

    def send(self, name, *args, queue=None, **kwargs):
        """Send ``e2e.<name>`` and return the task's id."""
        return str(self.producer.send_task(f"e2e.{name}", args=args, kwargs=kwargs, queue=queue).id)

    def outcome(self, task_id, timeout=TIMEOUT):
        """Wait for the task's end and return ``(state, result)`` from Celery's result backend."""
        result = self.producer.AsyncResult(task_id)
        until(result.ready, f"the end of task {task_id}", timeout=timeout)
        return result.state, result.result

    def run(self, name, *args, **kwargs):
        """Send a task and return its outcome."""
        return self.outcome(self.send(name, *args, **kwargs))

    def row(self, task_id, state=None, timeout=TIMEOUT):
        """Wait until a task is in ``state`` (``None``: any final one) and return the brain's row.

        The error contains the task's current state in the brain and in Celery.
        """
        row = None

        def found():
            nonlocal row
            row = self.brain.task(self.slug, "celery", task_id)
            return row if row and row["state"] in ({state} if state else FINISHED) else None

        what = f"a row of task {task_id} in state {state or 'final'}"
        try:
            return until(found, what, timeout=timeout, interval=0.1)
        except HarnessError as error:
            kinds, celery = self.kinds(task_id), self.producer.AsyncResult(task_id)
            raise HarnessError(
                f"{error}: events {kinds}, row {row}, Celery has {celery.state} {celery.result!r}"
            ) from None

    def kinds(self, task_id):
        """Return the sorted kinds of a task's events, whose times the brain rounds to seconds."""
        return sorted(event["kind"] for event in self.brain.events(self.slug, "celery", task_id))

    def warm_up(self, queue=None, timeout=TIMEOUT):
        """Send tasks until the brain shows a complete one, which proves that capture is active."""
        sent = []

        def complete():
            sent.append(self.send("add", 0, 0, queue=queue))
            row = self.brain.task(self.slug, "celery", sent[max(0, len(sent) - 3)])
            return row and row["state"] == "success" and row["started_at"]

        until(complete, "a complete row", timeout=timeout, interval=0.2)

    def sessions(self):
        """Return the time of the last connect by worker id."""
        return {
            row["worker_id"]: row["last_connect_at"] for row in self.brain.agent_workers(self.slug)
        }
