"""A worker without a restart of its own is restarted by the operator's command and its supervisor."""

import sys
import uuid
from pathlib import Path

import pytest

import z4j_bare
from z4j_bare.demo.process import Service, clean_environment, until
from z4j_bare.demo.rest import BrainRefusedError

APPS = Path(__file__).with_name("apps")
WORKER = "stub@e2e"


@pytest.fixture(
    params=[
        "gevent",
        pytest.param("eventlet", marks=pytest.mark.long),
        pytest.param("threads", marks=pytest.mark.long),
    ]
)
def supervised(request, brain, agent_credentials, tmp_path):
    """``supervised(**environment)``: a supervisor with one worker in it, whose agent is ``supervised.agent``."""
    started = []

    def start(**environment):
        start.agent = agent_credentials()
        root = str(Path(z4j_bare.__file__).parents[1])
        env = {
            **clean_environment(),
            "PYTHONPATH": root,
            **start.agent.env(tmp_path / "home"),
            **environment,
        }
        command = [
            sys.executable,
            str(APPS / "supervisord.py"),
            sys.executable,
            "-W",
            "ignore",
            str(APPS / "restartable.py"),
            request.param,
        ]
        service = Service(
            "the supervisor",
            command,
            environment=env,
            cwd=tmp_path,
            log=tmp_path / f"{uuid.uuid4().hex[:6]}.log",
        )
        started.append(service)
        service.spawn(
            lambda: any(row["name"] == WORKER for row in brain.workers(start.agent.project)), 40
        )
        return service

    yield start
    for service in started:
        service.stop()


def test_restart(supervised, brain):
    """The worker finishes, tells everything, ends and comes back as another process."""
    service = supervised()
    agent = supervised.agent

    def pids():
        return {
            row["pid"] for row in brain.agent_workers(agent.project) if row["state"] == "online"
        }

    (first,) = pids()
    issued = brain.issue(
        agent.project, "restart-worker", agent_id=agent.agent_id, worker_name=WORKER, engine="stub"
    )
    row = brain.wait_command(agent.project, issued["id"])
    assert row["status"] == "completed", row["error"]
    assert (row["result"]["pid"], row["result"]["supervisor"]) == (first, "supervisord, worker")
    (second,) = until(
        lambda: found if (found := pids()) and first not in found else None,
        "the next process",
        timeout=40,
    )
    assert second != first
    task = until(
        lambda: brain.task(agent.project, "stub", "last"),
        "what the first process did last",
        timeout=20,
    )
    assert task["state"] == "success"
    # worker.offline came last. Where the brain was too slow for the budget of the end, the next process delivers it.
    until(
        lambda: not list(service.cwd.glob(f"home/z4j-green-{first}-*")),
        "the end of the first one's store",
        timeout=75,
    )
    assert f"supervisor: {first} ended with 75" in service.output()


@pytest.mark.long
def test_without_a_supervisor_there_is_no_such_ability(supervised, brain):
    """Where nothing would start it again the worker does not offer to be restarted, and the brain refuses by itself."""
    supervised(Z4J_ORCHESTRATED="0")
    agent = supervised.agent
    with pytest.raises(BrainRefusedError, match="422"):
        brain.issue(
            agent.project,
            "restart-worker",
            agent_id=agent.agent_id,
            worker_name=WORKER,
            engine="stub",
        )
