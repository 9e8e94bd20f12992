"""A restart command for a worker that can only exit, and is restarted by its supervisor."""

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
    """``supervised(**environment)``: start a supervisor with one worker.

    The worker's agent is ``supervised.agent``.
    """
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


def test_restart_command_replaces_process(supervised, brain):
    """The worker finishes its task, sends all events, exits, and is replaced by a new process."""
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
        "the last task of the first process",
        timeout=20,
    )
    assert task["state"] == "success"
    # worker.offline is the last event. If the brain is too slow, the next process sends it.
    until(
        lambda: not list(service.cwd.glob(f"home/z4j-green-{first}-*")),
        "the deletion of the first process's store",
        timeout=75,
    )
    assert f"supervisor: {first} ended with 75" in service.output()


@pytest.mark.long
def test_restart_without_supervisor_is_rejected(supervised, brain):
    """Without a supervisor the worker offers no restart, and the brain rejects the command."""
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
