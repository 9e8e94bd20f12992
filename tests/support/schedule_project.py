"""What an operator does with schedules over the brain's REST API, and waits for."""

import sys
import uuid
from importlib.util import find_spec

import pytest

from tests.support.e2e_project import APPS, E2EProject
from z4j_bare.demo import process
from z4j_bare.demo.process import Service, clean_environment
from z4j_bare.demo.rest import BrainRefusedError

MODES = ("threads", "gevent", "eventlet")
PATIENCE = 30.0
TOO_MANY = 429

#: What is created, wherever it is.
MADE = {
    "name": "made",
    "kind": "interval",
    "expression": "3600",
    "timezone": "UTC",
    "queue": None,
    "kwargs": {},
    "is_enabled": True,
}


def requires_module(module, why="not installed; tox installs it"):
    """Mark a test that nothing can be said of without ``module``."""
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module}: {why}")


class Operator:
    """Looks after the schedules of ``self.slug`` at ``self.brain``."""

    def schedules(self):
        """The brain's rows, by name."""
        return {
            row["name"]: row for row in self.brain.get(f"/projects/{self.slug}/schedules")["items"]
        }

    def known(self, name, **wanted):
        """Wait until the brain knows a schedule like that; return its row."""

        def there():
            row = self.schedules().get(name)
            return row if row and wanted.items() <= row.items() else None

        return process.until(there, f"schedule {name} with {wanted}", timeout=PATIENCE)

    def gone(self, name):
        process.until(
            lambda: name not in self.schedules(), f"the end of schedule {name}", timeout=PATIENCE
        )

    def act(self, name, what):
        """``trigger``, ``enable`` or ``disable`` a schedule, and wait for the command's success."""
        before = {row["id"] for row in self.brain.commands(self.slug)}
        self.post(f"/schedules/{self.schedules()[name]['id']}/{what}")
        return self.answered(before)

    def post(self, path, *, tolerated=()):
        """POST below the project; the brain takes ten triggers and resyncs a minute from one address, so wait where it refuses."""

        def accepted():
            try:
                self.brain.post(f"/projects/{self.slug}{path}")
            except BrainRefusedError as error:
                if error.status == TOO_MANY:
                    return False
                if error.status not in tolerated:
                    raise
            return True

        process.until(accepted, f"leave to {path}", timeout=90, interval=3)

    def change(self, operation, scheduler, schedule=None, /, **definition):
        """Create, update or delete a schedule where it lives, and wait until the brain has it confirmed."""
        row = self.schedules()[schedule] if schedule else {"id": None, "control_token": None}
        asked = {"schedule_id": row["id"], "observed_control_token": row["control_token"]}
        path = f"/projects/{self.slug}/schedules/native-operations"
        issued = self.brain.post(
            path, request_id=str(uuid.uuid4()), operation=operation, scheduler=scheduler, definition=definition,
            **{key: value for key, value in asked.items() if value},
        )  # fmt: skip

        def ended():
            found = self.brain.get(f"{path}/{issued['id']}")
            return found if found["status"] not in ("PENDING", "DISPATCHED") else None

        found = process.until(ended, f"the end of {operation}", timeout=PATIENCE)
        assert found["status"] == "APPLIED", found

    def answered(self, before):
        """Wait for the one command that was not there before, and return its result."""
        fresh = process.until(
            lambda: [row for row in self.brain.commands(self.slug) if row["id"] not in before],
            "a command",
            timeout=PATIENCE,
        )
        row = self.brain.wait_command(self.slug, fresh[0]["id"])
        assert row["status"] == "completed", row["error"]
        return row["result"]

    def resync(self):
        """Ask for all schedules; on SQLite the brain answers 500 although it has asked the agent."""
        self.post("/schedules:resync", tolerated=(500,))


class ScheduleProject(Operator, E2EProject):
    """A place whose operator looks after schedules."""

    def marked(self, name="triggered"):
        """Wait for the file that a triggered task leaves, and remove it."""
        process.until((self.home / name).exists, f"the mark {name}", timeout=PATIENCE)
        (self.home / name).unlink()


class SchedulerHost(Service):
    """A host with nothing but a scheduler: ``apps/timed.py``, as a context manager; it has a session when it begins."""

    def __init__(self, project, mode, kind):
        self.project = project
        super().__init__(
            f"the {kind} host in {mode}",
            [sys.executable, str(APPS / "timed.py"), mode, kind],
            environment={**clean_environment(), **project.environment()},
            cwd=project.home,
            log=project.home / "host.log",
        )

    def __enter__(self):
        self.spawn(lambda: bool(self.project.sessions()), PATIENCE)
        return self
