"""Hosts of the published adapters: each has its own project in the brain."""

import json
import os
import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path

from redis import Redis

import z4j_bare
from z4j_bare.buffer.report import rows
from z4j_bare.demo.process import HarnessError, Service, clean_environment, until

APPS = Path(__file__).parents[1] / "adapters" / "apps"
SCRIPTS = Path(sys.executable).parent

#: Timeout of each awaited condition, in seconds.
TIMEOUT = 40.0


class AdapterProject:
    """A project with one agent, an empty broker, and a log of the tasks' actions.

    As a context manager it stops its hosts at the end.

    :param app: the module in ``apps`` that the host runs.
    :param engine: the brain's name of the queue engine.
    """

    def __init__(self, brain, redis_url, home, app, engine):
        self.brain = brain
        self.redis_url = redis_url.rpartition("/")[0] + "/3"
        self.home = home
        self.app = app
        self.engine = engine
        self.task_log = home / "tasks.jsonl"
        self.slug = f"p-{uuid.uuid4().hex[:12]}"
        self._stack = ExitStack()

    def __enter__(self):
        self.brain.create_project(self.slug)
        self.agent = self.brain.mint_agent(self.slug, "agent")
        with Redis.from_url(self.redis_url) as client:
            client.flushdb()
        return self

    def __exit__(self, *exc):
        self._stack.__exit__(*exc)
        self.brain.archive_project(self.slug)

    def environment(self, **extra):
        """Return the environment of a host: the variables of its app and of its agent."""
        path = os.pathsep.join((str(APPS), str(Path(z4j_bare.__file__).parents[1])))
        return {
            **clean_environment(),
            "PYTHONPATH": path,
            "REDIS_URL": self.redis_url,
            "Z4J_RQ_REDIS_URL": self.redis_url,
            "TASK_LOG": str(self.task_log),
            **self.agent.env(self.home / "agent"),
            **extra,
        }

    def start(self, script, *arguments, processes=1, **environment):
        """Run a console script as the host and return its :class:`Service`.

        Wait until ``processes`` agents are online.
        """
        host = Service(
            script,
            [str(SCRIPTS / script), *arguments],
            environment=self.environment(**environment),
            cwd=self.home,
            log=self.home / "host.log",
        )
        self._stack.enter_context(host)
        host.spawn(lambda: self.sessions() >= processes, TIMEOUT)
        return host

    def sessions(self):
        """Return the number of processes whose agent has a session."""
        return sum(row["state"] == "online" for row in self.brain.agent_workers(self.slug))

    def send(self, *tasks):
        """Enqueue ``(name, *arguments)`` tuples in a process without an agent; return the ids."""
        argument = json.dumps([[name, args] for name, *args in tasks])
        done = subprocess.run(
            [sys.executable, APPS / "send.py", self.app, argument],
            env=self.environment(Z4J_DISABLED="1"),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise HarnessError(f"send.py {self.app}: {done.stderr.strip()[-1500:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def warm_up(self):
        """Enqueue tasks until the brain has received one.

        Events that a prefork child sends before the agent listens are lost.
        """
        sent = []
        until(
            lambda: sent.extend(self.send(("add", 0, 0))) or self.count_succeeded(sent),
            "the end of a first task",
            timeout=TIMEOUT,
        )

    def actions(self, action=None):
        """Return the logged actions of tasks, or only those with the name ``action``."""
        lines = self.task_log.read_text().splitlines() if self.task_log.exists() else []
        return [line for line in map(json.loads, lines) if action in (None, line["action"])]

    def assert_no_loop_seen(self):
        """Wait for a loop check, and assert that no running loop but the host's own was visible.

        The task must also have been able to run its own loop.
        """
        check = until(lambda: self.actions("checks_loop"), "the loop check", timeout=TIMEOUT)[-1]
        assert (check["seen"], check["own"]) == (0, "ran")
        assert check["checks"] > 100

    def row(self, task_id, state):
        """Wait until a task is in ``state`` in the brain, and return its row."""
        row = None

        def found():
            nonlocal row
            row = self.brain.task(self.slug, self.engine, task_id)
            return row if row and row["state"] == state else None

        try:
            return until(found, f"task {task_id} in state {state}", timeout=TIMEOUT, interval=0.1)
        except HarnessError as error:
            raise AssertionError(f"{error}: {row}, actions {self.actions()}") from None

    def kinds(self, task_id):
        """Return the kinds of a task's events."""
        return {event["kind"] for event in self.brain.events(self.slug, self.engine, task_id)}

    def count_succeeded(self, task_ids):
        """Return the number of these tasks whose success the brain has received.

        The events are counted, because the brain on SQLite may store an event and fail to write
        the row of its task, which it does not retry.
        """
        known = (
            task_id
            for task_id in task_ids
            if self.brain.task(self.slug, self.engine, task_id) is not None
        )
        return sum("task.succeeded" in self.kinds(task_id) for task_id in known)

    def count_buffered(self):
        """Return the number of ``task.succeeded`` events in the buffers of ended processes."""
        paths = (self.home / "agent").glob("z4j-green-*.sqlite")
        return sum(b"task.succeeded" in row.payload for path in paths for row in rows(path))

    def submit(self, name, *args):
        """Submit a task as an operator does, and return the finished command.

        The brain submits a task by the manual trigger of a schedule.
        """
        schedule = self.brain.post(
            f"/projects/{self.slug}/schedules",
            name=f"{name}-{uuid.uuid4().hex[:6]}",
            engine=self.engine,
            task_name=name,
            args=list(args),
            kind="interval",
            expression="86400",
            timezone="UTC",
            queue=None,
            kwargs={},
        )
        self.brain.post(f"/projects/{self.slug}/schedules/{schedule['id']}/trigger")
        newest = next(
            row for row in self.brain.commands(self.slug) if row["action"] == "submit_task"
        )
        return self.brain.wait_command(self.slug, newest["id"])

    def command(self, route, **body):
        """Issue a command and return its row after it has finished."""
        issued = self.brain.issue(
            self.slug, route, agent_id=self.agent.agent_id, engine=self.engine, **body
        )
        return self.brain.wait_command(self.slug, issued["id"])
