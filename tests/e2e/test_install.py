"""How the agent comes into a process, or stays out of it."""

import subprocess
import sys

import pytest

from tests.support.e2e_project import Place
from z4j_bare.demo.process import until
from z4j_bare.demo.worker import worker_environment

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def place(brain, redis_url, tmp_path_factory):
    with Place(brain, redis_url, tmp_path_factory.mktemp("install")) as here:
        yield here


@pytest.fixture(scope="module")
def automatic(place):
    """A worker whose app only imports z4j_celery."""
    worker = place.worker("automatic", pool="gevent", name="w@automatic")
    place.warm_up()
    return worker


def celery(place, *words):
    """Start a ``celery`` command on the app that installs the agent at import."""
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "installed", *words],
        env=worker_environment(place.environment()), cwd=place.home,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_z4j_celery_starts_the_agent_by_itself(place, automatic):
    """With the environment and ``import z4j_celery`` alone the worker reports its tasks and takes commands."""
    row = place.row(place.send("add", 1, 2), "success")
    assert (row["args"], row["result"], row["worker_name"]) == ([1, 2], 5 - 2, "w@automatic")
    assert [(row["pid"], row["role"]) for row in place.brain.agent_workers(place.project)] == [
        (automatic.pid, "task")
    ]
    resize = place.brain.issue(
        place.project,
        "pool-resize",
        agent_id=place.agent.agent_id,
        worker_name="w@automatic",
        delta=1,
    )
    assert resize["action"] == "pool_grow"


def test_visiting_commands_leave_no_trace(place, automatic):
    """``celery inspect``, ``status``, ``report`` and ``shell`` on an app with the agent do not call the brain."""
    before = place.sessions()
    visits = [
        celery(place, "inspect", "ping"),
        celery(place, "status"),
        celery(place, "report"),
        celery(place, "shell", "--python"),
    ]
    outputs = [visit.communicate(timeout=60)[0] for visit in visits]
    assert [visit.returncode for visit in visits] == [0, 0, 0, 0], outputs
    assert "pong" in outputs[0]
    assert place.sessions() == before


def test_a_disabled_agent_stays_out(brain, redis_url, tmp_path):
    """With ``Z4J_DISABLED`` the worker runs its tasks, and the brain never hears of it."""
    with Place(brain, redis_url, tmp_path) as place:
        worker = place.worker(pool="threads", environment={"Z4J_DISABLED": "1"})
        assert place.run("add", 1, 2) == ("SUCCESS", 3)
        assert worker.stop() == 0
        assert brain.agent_workers(place.project) == []
        assert brain.tasks(place.project) == []
        assert "Traceback" not in worker.output()


def test_a_wrong_token_is_one_warning(brain, redis_url, tmp_path):
    """With a token that the brain does not know the worker runs normally, and one line says which variable to mend."""
    with Place(brain, redis_url, tmp_path) as place:
        worker = place.worker(pool="threads", environment={"Z4J_TOKEN": "x" * 43})
        until(lambda: "Z4J_TOKEN" in worker.output(), "the warning", timeout=20)
        assert place.run("add", 1, 2) == ("SUCCESS", 3)
        assert worker.stop() == 0
        lines = [line for line in worker.output().splitlines() if "Z4J_TOKEN" in line]
        assert len(lines) == 1
        assert "WARNING" in lines[0]
        assert "x" * 43 not in worker.output()
        assert brain.agent_workers(place.project) == []
