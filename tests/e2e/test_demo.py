"""The demo command, and the brain and worker processes that it starts."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from z4j_bare.demo import broker, command
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import POOLS, Worker, worker_environment

pytestmark = pytest.mark.timeout(300)

#: The figures of the report in every pool, and their counts.
FIGURES = {
    "plain": 50,
    "failing": 1,
    "automatic retry": 1,
    "asyncio.run": 5,
    "Django ORM": 5,
    "failing before retry": 1,
    "retried by operator": 1,
    "plain, no loop visible": 50,
    "retry events": 1,
    "operator commands": 2,
    "unknown tasks": 0,
}

#: The figure of the cancelled task in the pools that can terminate a running task.
CANCELLED = dict.fromkeys(("gevent", "eventlet", "prefork"), "cancelled while running")


def start_demo(temporary, *arguments):
    environment = worker_environment({"TMPDIR": str(temporary)})
    return subprocess.Popen(
        [sys.executable, "-m", "z4j_bare", "demo", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_demo(temporary, *arguments):
    """Run the demo to its end and return exit code, stdout and stderr."""
    with start_demo(temporary, *arguments) as demo:
        try:
            out, err = demo.communicate(timeout=240)
        except BaseException:
            demo.terminate()  # The demo stops its brain and worker.
            raise
    return demo.returncode, out, err


def processes_of(temporary):
    """Return the ids of processes whose environment contains the directory."""
    mark = f"{temporary}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.parametrize("pool", POOLS)
def test_demo_figures_agree_in_every_pool(pool, tmp_path):
    """In every pool the brain shows what the script produced, and the demo deletes its files."""
    code, out, err = run_demo(tmp_path, "--json", "--pool", pool)
    assert out, err
    report = json.loads(out)
    assert (code, report["problems"], report["mismatches"]) == (0, [], []), err
    assert {figure["kind"]: figure["produced"] for figure in report["figures"]} == {
        **FIGURES,
        CANCELLED.get(pool, "cancelled before start"): 1,
    }
    assert all(figure["seen"] == figure["produced"] for figure in report["figures"])
    assert report["ok"]
    assert report["agent"]["state_at_work"] == "online"
    assert report["worker"]["seen"] == ["worker@demo"]
    assert report["worker"]["exit_code"] == 0
    assert 0 < report["slowest_delay"] < 10
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_demo_cleans_up_shared_broker(redis_url, tmp_path):
    """On Redis all figures agree, the demo's keys are deleted, and other keys stay."""
    with Redis.from_url(redis_url) as client:
        client.set("other", "1")
        code, out, err = run_demo(
            tmp_path, "--pool", "prefork", "--tasks", "10", "--broker", redis_url
        )
        assert code == 0, out + err
        assert "All figures agree." in out
        assert client.keys() == [b"other"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_demo(number, tmp_path):
    """A signal during the run stops brain and worker, deletes the directory and prints one line."""
    with start_demo(tmp_path, "--pool", "threads") as demo:
        for line in demo.stderr:
            if "one at a time" in line:
                break
        demo.send_signal(number)
        out, err = demo.communicate(timeout=30)
    assert demo.returncode == 128 + number
    assert out == ""
    assert err.splitlines()[-1] == "z4j-bare demo: interrupted; brain and worker are stopped"
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_demo_with_keep_runs_brain_until_signal(tmp_path):
    """With --keep the brain runs until Ctrl-C, and the directory is not deleted."""
    with start_demo(tmp_path, "--pool", "threads", "--tasks", "5", "--keep", "--json") as demo:
        report = json.loads(demo.stdout.readline())
        brain = Brain(
            Path(report["directory"]) / "brain",
            port=int(report["dashboard"]["url"].rpartition(":")[2]),
        )
        brain.login(report["dashboard"]["email"], report["dashboard"]["password"])
        assert len(brain.tasks("demo", name="demo.uses_asyncio")) == 5
        brain.close()
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=30)
    assert demo.returncode == 0, err
    assert Path(report["directory"]).is_dir()
    assert processes_of(tmp_path) == []


def test_unreachable_broker_is_reported_in_one_line(tmp_path):
    """An unreachable broker is reported in one line, without its password, with exit code 1."""
    code, out, err = run_demo(tmp_path, "--broker", "redis://:secret@127.0.0.1:1/0")
    assert (code, out) == (1, "")
    assert err.startswith("z4j-bare demo: no broker answers at redis://:**@127.0.0.1:1/0")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_reported(monkeypatch, capsys):
    """Without the brain package the demo prints which extra to install."""
    monkeypatch.setattr(command, "brain_command", lambda: None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([])) == 1
    assert "pip install 'z4j-bare[demo]'" in capsys.readouterr().err


def test_failed_brain_start_raises_error_with_log(tmp_path):
    """A brain that exits while starting raises an error that names the log with the cause."""
    broken = Brain(tmp_path / "brain", environment={"Z4J_DATABASE_URL": "nonsense://"})
    with pytest.raises(
        HarnessError, match=r"the brain exited with code \d+ while starting"
    ) as caught:
        broken.start()
    assert caught.value.log.stat().st_size > 0


def test_failed_worker_start_raises_error_with_log(tmp_path):
    """A worker whose application cannot be imported raises an error that names the log."""
    broken = Worker("no_such_application", pool="solo", log=tmp_path / "worker.log", environment={})
    with pytest.raises(HarnessError, match="while starting") as caught:
        broken.start()
    assert "no_such_application" in caught.value.log.read_text()


def test_worker_fixture_connects_agent(brain, agent_credentials, worker, redis_url, tmp_path):
    """A worker from the fixtures connects its agent; the brain does not list a revoked agent."""
    agent = agent_credentials("fixture")
    environment = {**agent.env(tmp_path / "agent"), **broker.environment(tmp_path, redis_url)}
    running = worker("z4j_bare.demo.app", pool="threads", environment=environment)
    until(
        lambda: brain.agent(agent.project, agent.agent_id)["state"] == "online",
        "the agent online",
        timeout=30,
    )
    until(lambda: brain.agent_workers(agent.project), "its process", timeout=10)
    assert running.stop() == 0
    brain.revoke_agent(agent.project, agent.agent_id)
    assert agent.agent_id not in {row["id"] for row in brain.agents(agent.project)}


def test_issue_to_offline_agent_returns_stored_command(brain, agent_credentials):
    """The brain returns 503 for an offline agent but stores the command; ``issue`` returns it."""
    agent = agent_credentials("absent")
    issued = brain.issue(agent.project, "purge-queue", agent_id=agent.agent_id, queue="nobody")
    assert (issued["action"], issued["status"]) == ("purge_queue", "pending")
    assert brain.command(agent.project, issued["id"])["id"] == issued["id"]


def test_restarted_brain_keeps_its_data(tmp_path):
    """After ``restart`` and ``kill`` the brain has the same port, projects and agents."""
    with Brain(tmp_path / "brain") as brain:
        brain.create_project("lasting")
        agent = brain.mint_agent("lasting", "one")
        brain.restart()
        brain.kill()
        assert not brain.running
        brain.start()
        assert [row["id"] for row in brain.agents("lasting")] == [agent.agent_id]
