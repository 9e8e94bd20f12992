"""Upgrade from the existing agent and back, with unsent events and a schedule file.

The existing agent is installed from the package index into an environment of its own.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import z4j_bare
from benchmarks.environments import existing_python
from tests.support.e2e_project import APPS
from z4j_bare.demo.brain import free_port
from z4j_bare.demo.process import until

TASKS = 60

#: What both agents read from the file after ``change``: enabled, expression, arguments. The code
#: has another expression than at the time of the change.
CHANGED = {
    "paused": [False, "0 4 * * *", []],
    "changed": [False, "9 9 * * *", []],
    "untouched": [True, "0 4 * * *", []],
    "made 'ü\"": [True, "6 * * * *", [True, 1]],
}


@pytest.fixture(scope="session")
def existing():
    """The interpreter of the environment with the existing agent."""
    return existing_python()


class Host:
    """Runs ``either_agent.py`` under one of the agents, with one home."""

    def __init__(self, python, environment):
        self.python = python
        root = "" if python != sys.executable else str(Path(z4j_bare.__file__).parents[1])
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": root,
            "PYTHONWARNINGS": "ignore",
            **environment,
        }

    def run(self, *words, **variables):
        """Run the script; return its standard error and the schedules that it printed."""
        done = subprocess.run(
            [self.python, str(APPS / "either_agent.py"), *map(str, words)],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr, json.loads(done.stdout) if done.stdout else None

    @contextmanager
    def serving(self, log, *prefixes):
        """Run an agent during the block, with its output in ``log``; record a task per prefix."""
        command = [self.python, str(APPS / "either_agent.py"), "serve", *prefixes]
        with (
            log.open("wb") as output,
            subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                yield
                process.stdin.close()
                assert process.wait(20) == 0
            finally:
                process.kill()


@pytest.fixture
def hosts(agent_credentials, tmp_path, existing):
    """The two agents with one home and one project, the existing one first."""
    environment = agent_credentials().env(tmp_path / "home")
    return Host(existing, environment), Host(sys.executable, environment)


def finished(brain, project, prefix):
    """Return the number of the tasks of ``prefix`` that the brain shows as succeeded."""
    rows = brain.tasks(project, state="success")
    return sum(row["task_id"].startswith(f"{prefix}-") for row in rows)


def buffers(home):
    return sorted(path.name for path in home.glob("buffer-*"))


def test_upgrade_sends_unsent_events_and_keeps_schedules(hosts, brain, tmp_path):
    """The events of a stopped and of a killed process arrive; changed schedules stay changed."""
    existing, ours = hosts
    home, project = tmp_path / "home", existing.environment["Z4J_PROJECT_ID"]
    away = {"Z4J_BRAIN_URL": f"http://127.0.0.1:{free_port()}"}
    existing.run("record", "stopped", TASKS, **away)
    existing.run("kill", "killed", TASKS, **away)
    assert existing.run("change")[1] == CHANGED
    files = [name for name in buffers(home) if name.endswith(".sqlite")]
    assert len(files) == 2

    listed = subprocess.run(
        [sys.executable, "-m", "z4j_bare", "buffer", "list", "--json"],
        env=ours.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    rows = json.loads(listed.stdout)["existing_agent"]
    assert [(row["rows"]["event_batch"], row["trouble"]) for row in rows] == [(3 * TASKS, "")] * 2
    log = tmp_path / "ours.log"
    with ours.serving(log):
        for prefix in ("stopped", "killed"):
            until(
                lambda prefix=prefix: finished(brain, project, prefix) == TASKS,
                f"the events of the {prefix} process",
                timeout=60,
            )
        until(lambda: buffers(home) == [], "the deletion of the files", timeout=20)
    text = log.read_text()
    assert [text.count(f"left unsent events in {home / name}") for name in files] == [1, 1]
    task = brain.task(project, "celery", "killed-7")
    assert (task["name"], task["state"], task["args"]) == ("shop.add", "success", [7])
    assert ours.run("schedules")[1] == CHANGED


def test_return_to_existing_agent_keeps_schedules(hosts, brain, tmp_path):
    """After ``buffer flush`` no event is left, and the existing agent reads the schedule file."""
    existing, ours = hosts
    home, project = tmp_path / "home", existing.environment["Z4J_PROJECT_ID"]
    away = {"Z4J_BRAIN_URL": f"http://127.0.0.1:{free_port()}"}
    ours.run("kill", "ours", TASKS, **away)
    assert ours.run("change")[1] == CHANGED
    flushed = subprocess.run(
        [sys.executable, "-m", "z4j_bare", "buffer", "flush"],
        env=ours.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert flushed.returncode == 0, flushed.stdout + flushed.stderr
    until(lambda: finished(brain, project, "ours") == TASKS, "the flushed events", timeout=30)
    assert list(home.glob("z4j-green-*")) == []

    assert existing.run("schedules")[1] == CHANGED
    with existing.serving(tmp_path / "existing.log", "existing"):
        until(
            lambda: finished(brain, project, "existing") == 1,
            "an event of the existing agent",
            timeout=60,
        )


def test_both_agents_write_one_schedule_file(hosts, tmp_path):
    """If two processes change the file at the same time, neither loses a change of the other."""
    number = 20
    (tmp_path / "home").mkdir(mode=0o700, exist_ok=True)
    writers = [
        subprocess.Popen(
            [host.python, str(APPS / "either_agent.py"), "create", name, str(number)],
            env=host.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, host in zip(("existing", "ours"), hosts, strict=True)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        for writer in writers:
            _, errors = writer.communicate(timeout=60)
            assert (writer.returncode, errors) == (0, "")
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    made = {f"{name}-{index}" for name in ("existing", "ours") for index in range(number)}
    for host in hosts:
        _, found = host.run("schedules")
        assert set(found) == made | {"paused", "changed", "deleted", "untouched"}
