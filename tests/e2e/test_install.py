"""Installation of the agent in a process, and processes in which it must not start."""

import subprocess
import sys

import pytest

from z4j_bare.demo.process import until
from z4j_bare.demo.worker import worker_environment

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def automatic(project):
    """A worker whose app only imports z4j_celery."""
    worker = project.worker("autostart", pool="gevent", name="w@autostart")
    project.warm_up()
    return worker


def celery(project, *words):
    """Start a ``celery`` command with the app that installs the agent at import."""
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "installed", *words],
        env=worker_environment(project.environment()),
        cwd=project.home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_import_of_z4j_celery_starts_agent(project, automatic):
    """With only the environment and ``import z4j_celery`` a worker reports and takes commands."""
    row = project.row(project.send("add", 1, 2), "success")
    assert (row["args"], row["result"], row["worker_name"]) == ([1, 2], 3, "w@autostart")
    assert [(row["pid"], row["role"]) for row in project.brain.agent_workers(project.slug)] == [
        (automatic.pid, "task")
    ]
    resize = project.brain.issue(
        project.slug,
        "pool-resize",
        agent_id=project.agent.agent_id,
        worker_name="w@autostart",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


def test_inspection_commands_do_not_connect(project, automatic):
    """``celery inspect``, ``status``, ``report`` and ``shell`` do not connect to the brain."""
    before = project.sessions()
    commands = [
        celery(project, "inspect", "ping"),
        celery(project, "status"),
        celery(project, "report"),
        celery(project, "shell", "--python"),
    ]
    outputs = [command.communicate(timeout=60)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0, 0], outputs
    assert "pong" in outputs[0]
    assert project.sessions() == before


def test_disabled_agent_does_not_connect(fresh_project):
    """With ``Z4J_DISABLED`` the worker runs its tasks, and the brain receives nothing."""
    worker = fresh_project.worker(pool="threads", environment={"Z4J_DISABLED": "1"})
    assert fresh_project.run("add", 1, 2) == ("SUCCESS", 3)
    assert worker.stop() == 0
    assert fresh_project.brain.agent_workers(fresh_project.slug) == []
    assert fresh_project.brain.tasks(fresh_project.slug) == []
    assert "Traceback" not in worker.output()


def test_wrong_token_logs_one_warning(fresh_project):
    """With a wrong token the worker runs normally and logs one warning that names the variable."""
    worker = fresh_project.worker(pool="threads", environment={"Z4J_TOKEN": "x" * 43})
    until(lambda: "Z4J_TOKEN" in worker.output(), "the warning", timeout=20)
    assert fresh_project.run("add", 1, 2) == ("SUCCESS", 3)
    assert worker.stop() == 0
    lines = [line for line in worker.output().splitlines() if "Z4J_TOKEN" in line]
    assert len(lines) == 1
    assert "WARNING" in lines[0]
    assert "x" * 43 not in worker.output()
    assert fresh_project.brain.agent_workers(fresh_project.slug) == []
