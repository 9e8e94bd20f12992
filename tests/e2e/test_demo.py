"""The demo as its user runs it, and the harness underneath it."""

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

#: One line of the table each, and how many tasks, events or commands it is about.
ALWAYS = {
    "plain": 50,
    "failing": 1,
    "retrying by itself": 1,
    "asyncio.run": 5,
    "Django ORM": 5,
    "failing until retried": 1,
    "retried by the operator": 1,
    "plain, no loop visible": 50,
    "retries": 1,
    "operator's commands": 2,
    "sent by nobody": 0,
}
CANCELLED = dict.fromkeys(("gevent", "eventlet", "prefork"), "cancelled while running")


def start_demo(temporary, *arguments):
    environment = worker_environment({"TMPDIR": str(temporary)})
    return subprocess.Popen(
        [sys.executable, "-m", "z4j_bare", "demo", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_demo(temporary, *arguments):
    """Run it to its end and return exit code, stdout and stderr."""
    with start_demo(temporary, *arguments) as demo:
        try:
            out, err = demo.communicate(timeout=240)
        except BaseException:
            demo.terminate()  # it stops what it started
            raise
    return demo.returncode, out, err


def processes_of(temporary):
    """Return the ids of living processes whose environment names the directory."""
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
def test_every_figure_agrees(pool, tmp_path):
    """In every pool the brain shows exactly what the script produced, and the demo leaves nothing behind."""
    code, out, err = run_demo(tmp_path, "--json", "--pool", pool)
    assert out, err
    report = json.loads(out)
    assert (code, report["problems"], report["mismatches"]) == (0, [], []), err
    assert {figure["kind"]: figure["produced"] for figure in report["figures"]} == {
        **ALWAYS,
        CANCELLED.get(pool, "cancelled before its ETA"): 1,
    }
    assert all(figure["seen"] == figure["produced"] for figure in report["figures"])
    assert report["ok"]
    assert report["agent"]["state_at_work"] == "online"
    assert report["worker"]["seen"] == ["day@demo"]
    assert report["worker"]["exit_code"] == 0
    assert 0 < report["slowest_delay"] < 10
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_a_real_broker_is_left_as_it_was(redis_url, tmp_path):
    """On Redis every figure agrees too, other people's keys stay and none of the demo's do."""
    with Redis.from_url(redis_url) as client:
        client.set("theirs", "1")
        code, out, err = run_demo(
            tmp_path, "--pool", "prefork", "--tasks", "10", "--broker", redis_url
        )
        assert code == 0, out + err
        assert "Every figure agrees." in out
        assert client.keys() == [b"theirs"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(number, tmp_path):
    """A signal in the middle of the day ends brain and worker, removes the directory, says so in one line."""
    with start_demo(tmp_path, "--pool", "threads") as demo:
        for line in demo.stderr:
            if "one at a time" in line:
                break
        demo.send_signal(number)
        out, err = demo.communicate(timeout=30)
    assert demo.returncode == 128 + number
    assert out == ""
    assert err.splitlines()[-1] == "z4j-bare demo: interrupted, everything is stopped"
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_keep_leaves_the_brain_up_until_a_signal(tmp_path):
    """With --keep the object names a dashboard that answers, and Ctrl-C ends it without touching the directory."""
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


def test_no_broker_is_one_line(tmp_path):
    """A broker that does not answer costs one line with its address, without the password, and exit code 1."""
    code, out, err = run_demo(tmp_path, "--broker", "redis://:secret@127.0.0.1:1/0")
    assert (code, out) == (1, "")
    assert err.startswith("z4j-bare demo: no broker answers at redis://:**@127.0.0.1:1/0")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    """Without the brain the demo names what to install."""
    monkeypatch.setattr(command, "brain_command", lambda: None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([])) == 1
    assert "pip install 'z4j-bare[demo]'" in capsys.readouterr().err


def test_a_brain_that_does_not_boot_names_its_log(tmp_path):
    """A brain that ends while starting raises an error with the path of the log that says why."""
    broken = Brain(tmp_path / "brain", environment={"Z4J_DATABASE_URL": "nonsense://"})
    with pytest.raises(
        HarnessError, match=r"the brain ended with code \d+ while starting"
    ) as caught:
        broken.start()
    assert caught.value.log.stat().st_size > 0


def test_a_worker_that_does_not_come_up_names_its_log(tmp_path):
    """A worker whose application cannot be imported raises an error with the path of its log."""
    broken = Worker("no_such_application", pool="solo", log=tmp_path / "worker.log", environment={})
    with pytest.raises(HarnessError, match="while starting") as caught:
        broken.start()
    assert "no_such_application" in caught.value.log.read_text()


def test_the_fixtures_make_a_worker_the_brain_can_see(
    brain, agent_credentials, worker, redis_url, tmp_path
):
    """A worker from the fixtures, on Redis, connects its agent; a revoked agent disappears from the brain's list."""
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


def test_a_command_for_an_absent_agent_is_kept(brain, agent_credentials):
    """The brain refuses such a command with 503 and stores it all the same; ``issue`` returns the stored row."""
    agent = agent_credentials("absent")
    issued = brain.issue(agent.project, "purge-queue", agent_id=agent.agent_id, queue="nobody")
    assert (issued["action"], issued["status"]) == ("purge_queue", "pending")
    assert brain.command(agent.project, issued["id"])["id"] == issued["id"]


def test_a_restarted_brain_knows_what_it_knew(tmp_path):
    """``restart`` and ``kill`` keep home and port, so projects, agents and credentials live on."""
    with Brain(tmp_path / "brain") as brain:
        brain.create_project("lasting")
        agent = brain.mint_agent("lasting", "one")
        brain.restart()
        brain.kill()
        assert not brain.running
        brain.start()
        assert [row["id"] for row in brain.agents("lasting")] == [agent.agent_id]
