"""Schedules in code of huey, arq and taskiq: their publication and durable changes."""

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
    """A process with a scheduler.

    :param adapter: the adapter's distribution.
    :param scheduler: the scheduler's name in the brain.
    :param package: the scheduler's package.
    :param stop_signal: the signal that stops it; taskiq's scheduler handles only SIGINT.
    :param code: the exit code; Python ends itself by an unhandled SIGINT.
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

    def stop(self, process):
        """Send the stop signal, and wait for the end of the process."""
        os.kill(process.pid, self.stop_signal)
        until(lambda: not process.running, "the end of the process", timeout=20)


HOSTS = [
    Host(
        "z4j-hueyperiodic",
        "huey-periodic",
        "huey",
        "huey_periodic_app",
        ("huey_consumer", "-w", "2", "huey_periodic_app.huey"),
        signal.SIGINT,
    ),
    Host(
        "z4j-arqcron", "arq-cron", "arq", "arq_cron_app", ("python", str(APPS / "arq_cron_app.py"))
    ),
    Host(
        "z4j-taskiqscheduler",
        "taskiq-scheduler",
        "taskiq",
        "taskiq_scheduler_app",
        ("python", str(APPS / "taskiq_scheduler_app.py")),
        signal.SIGINT,
        -signal.SIGINT,
    ),
]


class SchedulerProject(ScheduleOperator, AdapterProject):
    """A project with a scheduler's host whose schedules an operator changes."""

    def nightly(self):
        """Return the name of the only schedule in code; taskiq appends a digest to it."""
        names = until(
            lambda: [name for name in self.schedules() if name.startswith("nightly")],
            "the schedule",
            timeout=30,
        )
        return names[0]

    def try_change(self, scheduler, schedule, expression):
        """Change a schedule; return ``False`` while no process publishes it."""
        try:
            self.change("update", scheduler, schedule, expression=expression)
        except BrainRefusedError as error:
            if error.status != NOT_CONNECTED:
                raise
            return False
        return True


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.package)
def test_changes_of_schedules_in_code_are_durable(host, brain, redis_url, tmp_path, prove):
    """Operators' changes take effect in the scheduler, and also in its next process."""
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
        host.stop(running)
        assert running.exit_code == host.code
        prove(
            host.row,
            "clean stop",
            f"{signal.Signals(host.stop_signal).name}, exit code {host.code}",
        )
        project.start(*host.command)
        # The brain accepts a change only after the scheduler has published the current state.
        until(
            lambda: project.try_change(host.scheduler, nightly, "45 5 * * *"),
            "a change in the next process",
            timeout=40,
            interval=1,
        )
        assert set(project.schedules()) == {nightly}
        prove(host.row, "command", "trigger, create, update, delete")


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.package)
def test_host_starts_without_task_of_created_schedule(host, brain, redis_url, tmp_path):
    """The host starts and a warning names the schedule, which has an effect if the task returns."""
    with SchedulerProject(brain, redis_url, tmp_path, host.app, host.package) as project:
        running = project.start(*host.command)
        nightly = project.nightly()
        project.change("update", host.scheduler, nightly, is_enabled=False)
        made = {**NEW_SCHEDULE, "kind": "cron", "expression": "0 5 * * *"}
        project.change("create", host.scheduler, **made, task_name="add", args=[1, 2])
        host.stop(running)
        running = project.start(*host.command, WITHOUT_ADD="1")
        log = project.home / "host.log"
        assert log.read_text().count("schedule 'made'") == 1
        host.stop(running)
        project.start(*host.command)
        until(
            lambda: project.try_change(host.scheduler, nightly, "45 5 * * *"),
            "a change in the next process",
            timeout=40,
            interval=1,
        )
        states = {name: row["is_enabled"] for name, row in project.schedules().items()}
        assert states == {nightly: False, "made": True}
        text = log.read_text()
        assert text.count("schedule 'made'") == 1
        assert "withheld" not in text
