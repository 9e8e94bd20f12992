"""A project whose schedules an operator changes over the brain's REST API."""

import sys
import uuid
from importlib.util import find_spec

from tests.support import parts
from tests.support.e2e_project import APPS, E2EProject
from z4j_bare.demo import process
from z4j_bare.demo.process import Service, clean_environment
from z4j_bare.demo.rest import BrainRefusedError

MODES = ("threads", "gevent", "eventlet")

#: Timeout of each awaited condition, in seconds.
TIMEOUT = 30.0

#: HTTP status of a request over the brain's rate limit.
TOO_MANY_REQUESTS = 429

#: Definition of a schedule that tests create.
NEW_SCHEDULE = {
    "name": "made",
    "kind": "interval",
    "expression": "3600",
    "timezone": "UTC",
    "queue": None,
    "kwargs": {},
    "is_enabled": True,
}


def requires_module(module, fix="tox installs it"):
    """Skip a test if ``module`` is not installed."""
    return parts.requires(find_spec(module) is not None, module, fix)


class ScheduleOperator:
    """Operations on the schedules of the project ``self.slug`` in ``self.brain``."""

    def schedules(self):
        """Return the brain's schedules by name."""
        rows = self.brain.get(f"/projects/{self.slug}/schedules")["items"]
        return {row["name"]: row for row in rows}

    def wait_schedule(self, name, **expected):
        """Wait until the brain has a schedule with the expected values, and return its row."""

        def found():
            row = self.schedules().get(name)
            return row if row and expected.items() <= row.items() else None

        return process.until(found, f"schedule {name} with {expected}", timeout=TIMEOUT)

    def wait_deleted(self, name):
        """Wait until the brain has no schedule with this name."""
        process.until(
            lambda: name not in self.schedules(),
            f"the deletion of schedule {name}",
            timeout=TIMEOUT,
        )

    def control(self, name, action):
        """``trigger``, ``enable`` or ``disable`` a schedule, and wait for the command's success."""
        before = {row["id"] for row in self.brain.commands(self.slug)}
        self.post(f"/schedules/{self.schedules()[name]['id']}/{action}")
        return self.wait_new_command(before)

    def post(self, path, *, tolerated=()):
        """POST to a path of the project.

        The brain accepts ten triggers and resyncs a minute from an address, so wait while it
        returns 429.
        """

        def accepted():
            try:
                self.brain.post(f"/projects/{self.slug}{path}")
            except BrainRefusedError as error:
                if error.status == TOO_MANY_REQUESTS:
                    return False
                if error.status not in tolerated:
                    raise
            return True

        process.until(accepted, f"an accepted POST to {path}", timeout=90, interval=3)

    def change(self, operation, scheduler, schedule=None, /, **definition):
        """Create, update or delete a schedule in its scheduler, and wait for the confirmation."""
        row = self.schedules()[schedule] if schedule else {"id": None, "control_token": None}
        target = {"schedule_id": row["id"], "observed_control_token": row["control_token"]}
        path = f"/projects/{self.slug}/schedules/native-operations"
        issued = self.brain.post(
            path,
            request_id=str(uuid.uuid4()),
            operation=operation,
            scheduler=scheduler,
            definition=definition,
            **{key: value for key, value in target.items() if value},
        )

        def finished():
            found = self.brain.get(f"{path}/{issued['id']}")
            return found if found["status"] not in ("PENDING", "DISPATCHED") else None

        found = process.until(finished, f"the end of {operation}", timeout=TIMEOUT)
        assert found["status"] == "APPLIED", found

    def wait_new_command(self, before):
        """Wait for the only command whose id is not in ``before``, and return its result."""
        new = process.until(
            lambda: [row for row in self.brain.commands(self.slug) if row["id"] not in before],
            "a command",
            timeout=TIMEOUT,
        )
        row = self.brain.wait_command(self.slug, new[0]["id"])
        assert row["status"] == "completed", row["error"]
        return row["result"]

    def resync(self):
        """Request a resync. On SQLite the brain returns 500, although it sends the command."""
        self.post("/schedules:resync", tolerated=(500,))


class ScheduleProject(ScheduleOperator, E2EProject):
    """A project with workers whose schedules an operator changes."""

    def wait_mark(self, name="triggered"):
        """Wait for the file that a triggered task creates, and delete it."""
        process.until((self.home / name).exists, f"the file {name}", timeout=TIMEOUT)
        (self.home / name).unlink()


class SchedulerHost(Service):
    """A process that runs ``apps/scheduler_host.py``: an agent with only a scheduler.

    As a context manager it waits until the agent has a session.
    """

    def __init__(self, project, mode, kind):
        self.project = project
        super().__init__(
            f"the {kind} host in {mode}",
            [sys.executable, str(APPS / "scheduler_host.py"), mode, kind],
            environment={**clean_environment(), **project.environment()},
            cwd=project.home,
            log=project.home / "host.log",
        )

    def __enter__(self):
        self.spawn(lambda: bool(self.project.sessions()), TIMEOUT)
        return self
