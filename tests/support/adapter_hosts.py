"""One adapter's host in a project of its own, and the scenario that every queue goes through."""

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
PATIENCE = 40.0


class AdapterProject:
    """A project with one agent, an empty broker, and a journal of what tasks did.

    :param app: the module in ``apps`` that the host runs.
    :param engine: what the brain calls its queue.

    As a context manager it stops its hosts at the end.
    """

    def __init__(self, brain, redis_url, home, app, engine):
        self.brain = brain
        self.redis_url = redis_url.rpartition("/")[0] + "/3"
        self.home = home
        self.app = app
        self.engine = engine
        self.journal = home / "journal"
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
        """Return the host's variables: the app's, and the agent's."""
        path = os.pathsep.join((str(APPS), str(Path(z4j_bare.__file__).parents[1])))
        return {
            **clean_environment(),
            "PYTHONPATH": path,
            "REDIS_URL": self.redis_url,
            "Z4J_RQ_REDIS_URL": self.redis_url,
            "JOURNAL": str(self.journal),
            **self.agent.env(self.home / "agent"),
            **extra,
        }

    def start(self, script, *words, processes=1, **environment):
        """Start a console script as the host, wait until as many agents are online, and return its :class:`Service`."""
        command = [str(SCRIPTS / script), *words]
        host = Service(
            script,
            command,
            environment=self.environment(**environment),
            cwd=self.home,
            log=self.home / "host.log",
        )
        self._stack.enter_context(host)
        host.spawn(lambda: self.sessions() >= processes, PATIENCE)
        return host

    def sessions(self):
        """Return how many processes have an agent with a session."""
        return sum(row["state"] == "online" for row in self.brain.agent_workers(self.slug))

    def send(self, *tasks):
        """Enqueue ``(name, *arguments)`` in a process without an agent, and return the tasks' ids."""
        words = json.dumps([[name, args] for name, *args in tasks])
        done = subprocess.run(
            [sys.executable, APPS / "send.py", self.app, words],
            env=self.environment(Z4J_DISABLED="1"), cwd=self.home, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise HarnessError(f"send.py {self.app}: {done.stderr.strip()[-1500:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def warm_up(self):
        """Enqueue tasks until the brain has heard of one: what a child of Celery's prefork tells before the agent listens is lost."""
        sent = []
        until(
            lambda: sent.extend(self.send(("add", 0, 0))) or self.told(sent),
            "the end of a first task",
            timeout=PATIENCE,
        )

    def did(self, what=None):
        """Return what tasks have noted so far, or only what they did by the name ``what``."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [line for line in map(json.loads, lines) if what in (None, line["did"])]

    def saw_no_loop(self):
        """Wait until a task has looked, and assert that it saw no loop but its host's own, and could run one of its own."""
        looked = until(lambda: self.did("looks"), "the end of the looking", timeout=PATIENCE)[-1]
        assert (looked["seen"], looked["own"]) == (0, "ran")
        assert looked["glances"] > 100

    def row(self, task_id, state):
        """Return the brain's row of a task once it is in ``state``."""
        row = None

        def there():
            nonlocal row
            row = self.brain.task(self.slug, self.engine, task_id)
            return row if row and row["state"] == state else None

        try:
            return until(there, f"task {task_id} in state {state}", timeout=PATIENCE, interval=0.1)
        except HarnessError as error:
            raise AssertionError(f"{error}: {row}, journal {self.did()}") from None

    def kinds(self, task_id):
        """Return the kinds of a task's events."""
        return {event["kind"] for event in self.brain.events(self.slug, self.engine, task_id)}

    def told(self, task_ids):
        """Return of how many of these tasks the brain has heard that they succeeded.

        By their events: on SQLite it may keep an event and refuse its row for a moment, and never make up for that.
        """
        known = (
            task_id
            for task_id in task_ids
            if self.brain.task(self.slug, self.engine, task_id) is not None
        )
        return sum("task.succeeded" in self.kinds(task_id) for task_id in known)

    def left(self):
        """Return how many ends of tasks are in the files that ended processes have left for the next one."""
        paths = (self.home / "agent").glob("z4j-green-*.sqlite")
        return sum(b"task.succeeded" in row.payload for path in paths for row in rows(path))

    def submit(self, name, *args):
        """Have the operator submit a task by its name, and return the finished command.

        The brain's way to it is a schedule's "run now".
        """
        body = {
            "kind": "interval",
            "expression": "86400",
            "timezone": "UTC",
            "queue": None,
            "kwargs": {},
        }
        schedule = self.brain.post(
            f"/projects/{self.slug}/schedules",
            name=f"{name}-{uuid.uuid4().hex[:6]}", engine=self.engine, task_name=name, args=list(args), **body,
        )  # fmt: skip
        self.brain.post(f"/projects/{self.slug}/schedules/{schedule['id']}/trigger")
        newest = next(
            row for row in self.brain.commands(self.slug) if row["action"] == "submit_task"
        )
        return self.brain.wait_command(self.slug, newest["id"])

    def command(self, route, **body):
        """Issue a command and return its row once it is finished."""
        issued = self.brain.issue(
            self.slug, route, agent_id=self.agent.agent_id, engine=self.engine, **body
        )
        return self.brain.wait_command(self.slug, issued["id"])
