"""huey's, arq's and taskiq's schedules, kept in code: told to the brain, changed from there, and changed for good."""

import os
import signal
from dataclasses import dataclass

import pytest

from tests.support.adapter_hosts import APPS, AdapterProject
from tests.support.schedule_project import NEW_SCHEDULE, ScheduleOperator
from z4j_bare.demo.process import until
from z4j_bare.demo.rest import BrainRefusedError

NOT_CONNECTED = 409

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]


@dataclass(frozen=True)
class Host:
    """A process in which schedules live.

    :param adapter: its distribution.
    :param scheduler: what the brain calls the scheduler.
    :param package: whose schedules they are.
    :param stop_signal: the signal that ends it; taskiq's scheduler knows only Ctrl-C.
    :param code: its exit code then; Python sends itself a Ctrl-C again that nobody has caught.
    """

    adapter: str
    scheduler: str
    package: str
    app: str
    command: tuple[str, ...]
    stop_signal: int = signal.SIGTERM
    code: int = 0

    @property
    def row(self):
        return self.adapter, f"{self.package}'s own", self.package


HOSTS = [
    Host(
        "z4j-hueyperiodic", "huey-periodic", "huey", "huey_periodic_app",
        ("huey_consumer", "-w", "2", "huey_periodic_app.huey"), signal.SIGINT,
    ),
    Host("z4j-arqcron", "arq-cron", "arq", "arq_cron_app", ("python", str(APPS / "arq_cron_app.py"))),
    Host(
        "z4j-taskiqscheduler", "taskiq-scheduler", "taskiq", "taskiq_scheduler_app",
        ("python", str(APPS / "taskiq_scheduler_app.py")), signal.SIGINT, -signal.SIGINT,
    ),
]  # fmt: skip


class SchedulerProject(ScheduleOperator, AdapterProject):
    """A stage whose operator looks after schedules."""

    def nightly(self):
        """Return the name of the one schedule in code, once it is known: taskiq's has a digest behind it."""
        names = until(
            lambda: [name for name in self.schedules() if name.startswith("nightly")],
            "the schedule",
            timeout=30,
        )
        return names[0]

    def try_change(self, scheduler, schedule, expression):
        """Change a schedule; ``False`` while the brain hears of it from nobody."""
        try:
            self.change("update", scheduler, schedule, expression=expression)
        except BrainRefusedError as error:
            if error.status != NOT_CONNECTED:
                raise
            return False
        return True


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.package)
def test_schedules_in_code_are_changed_for_good(host, brain, redis_url, tmp_path, prove):
    """What the code says is told; what operators change, make and delete holds in the scheduler, and in its next process too."""
    with SchedulerProject(brain, redis_url, tmp_path, host.app, host.package) as project:
        running = project.start(*host.command)
        nightly = project.nightly()
        prove(host.row, "events", "schedules reported")
        project.control(nightly, "trigger")
        project.assert_no_loop_seen()
        prove(host.row, "loop visible to tasks", "never")
        project.change("update", host.scheduler, nightly, expression="30 4 * * *")
        made = {**NEW_SCHEDULE, "kind": "cron", "expression": "* * * * *"}
        project.change("create", host.scheduler, **made, task_name="add", args=[1, 2])
        until(
            lambda: project.actions("add"),
            "the created schedule's task, at the full minute",
            timeout=90,
        )
        project.change("delete", host.scheduler, "made")
        project.wait_deleted("made")
        os.kill(running.pid, host.stop_signal)
        until(lambda: not running.running, "the end of the process", timeout=20)
        assert running.exit_code == host.code
        prove(
            host.row,
            "clean stop",
            f"{signal.Signals(host.stop_signal).name}, exit code {host.code}",
        )
        project.start(*host.command)
        # The brain allows a change of what the scheduler has told it, in the state in which it told it.
        until(
            lambda: project.try_change(host.scheduler, nightly, "45 5 * * *"),
            "a change in the next process",
            timeout=40,
            interval=1,
        )
        assert set(project.schedules()) == {nightly}
        prove(host.row, "command", "trigger, create, update, delete")
