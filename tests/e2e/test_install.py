"""How the agent comes into a process, or stays out of it."""

import subprocess
import sys

import pytest

from tests.support.e2e_project import E2EProject
from z4j_bare.demo.process import until
from z4j_bare.demo.worker import worker_environment

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def project(brain, redis_url, tmp_path_factory):
    with E2EProject(brain, redis_url, tmp_path_factory.mktemp("install")) as here:
        yield here


@pytest.fixture(scope="module")
def automatic(project):
    """A worker whose app only imports z4j_celery."""
    worker = project.worker("automatic", pool="gevent", name="w@automatic")
    project.warm_up()
    return worker


def celery(project, *words):
    """Start a ``celery`` command on the app that installs the agent at import."""
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "installed", *words],
        env=worker_environment(project.environment()), cwd=project.home,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_z4j_celery_starts_the_agent_by_itself(project, automatic):
    """With the environment and ``import z4j_celery`` alone the worker reports its tasks and takes commands."""
    row = project.row(project.send("add", 1, 2), "success")
    assert (row["args"], row["result"], row["worker_name"]) == ([1, 2], 5 - 2, "w@automatic")
    assert [(row["pid"], row["role"]) for row in project.brain.agent_workers(project.slug)] == [
        (automatic.pid, "task")
    ]
    resize = project.brain.issue(
        project.slug,
        "pool-resize",
        agent_id=project.agent.agent_id,
        worker_name="w@automatic",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


def test_visiting_commands_leave_no_trace(project, automatic):
    """``celery inspect``, ``status``, ``report`` and ``shell`` on an app with the agent do not call the brain."""
    before = project.sessions()
    visits = [
        celery(project, "inspect", "ping"),
        celery(project, "status"),
        celery(project, "report"),
        celery(project, "shell", "--python"),
    ]
    outputs = [visit.communicate(timeout=60)[0] for visit in visits]
    assert [visit.returncode for visit in visits] == [0, 0, 0, 0], outputs
    assert "pong" in outputs[0]
    assert project.sessions() == before


def test_a_disabled_agent_stays_out(brain, redis_url, tmp_path):
    """With ``Z4J_DISABLED`` the worker runs its tasks, and the brain never hears of it."""
    with E2EProject(brain, redis_url, tmp_path) as project:
        worker = project.worker(pool="threads", environment={"Z4J_DISABLED": "1"})
        assert project.run("add", 1, 2) == ("SUCCESS", 3)
        assert worker.stop() == 0
        assert brain.agent_workers(project.slug) == []
        assert brain.tasks(project.slug) == []
        assert "Traceback" not in worker.output()


def test_a_wrong_token_is_one_warning(brain, redis_url, tmp_path):
    """With a token that the brain does not know the worker runs normally, and one line says which variable to mend."""
    with E2EProject(brain, redis_url, tmp_path) as project:
        worker = project.worker(pool="threads", environment={"Z4J_TOKEN": "x" * 43})
        until(lambda: "Z4J_TOKEN" in worker.output(), "the warning", timeout=20)
        assert project.run("add", 1, 2) == ("SUCCESS", 3)
        assert worker.stop() == 0
        lines = [line for line in worker.output().splitlines() if "Z4J_TOKEN" in line]
        assert len(lines) == 1
        assert "WARNING" in lines[0]
        assert "x" * 43 not in worker.output()
        assert brain.agent_workers(project.slug) == []
