"""A process is killed during a command: the next process reports it and does not repeat it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import z4j_bare
from tests.support.peer import SECRET_TEXT, TOKEN

pytestmark = pytest.mark.thorough

#: An agent whose engine logs each call to a file, and hangs in it unless ``pace`` is "quick".
AGENT = """
import select, sys
mode, url, token, secret, call_log, pace = sys.argv[1:]
if mode == "gevent":
    from gevent import monkey; monkey.patch_all()
if mode == "eventlet":
    import eventlet; eventlet.monkey_patch()
import time
from z4j_core.models import CommandResult
from tests.support.engines import FakeEngine
from z4j_bare import install_agent

class LoggingEngine(FakeEngine):
    async def submit_task(self, name, **_options):
        return await self.cancel_task(name)
    async def cancel_task(self, task_id):
        with open(call_log, "a") as file:
            file.write(task_id + "\\n")
        if pace == "hang":
            time.sleep(60)
        return CommandResult(status="success", result={"task": task_id})

runtime = install_agent(
    engines=[LoggingEngine("cancel_task", "submit_task")],
    brain_url=url,
    token=token,
    project_id="demo",
    hmac_secret=secret,
)
while not select.select([sys.stdin], [], [], 0)[0]:
    time.sleep(0.05)
runtime.stop(timeout=5)
"""


@pytest.fixture
def call_log(tmp_path):
    """A file with one line for each call of the engine."""
    path = tmp_path / "calls"
    path.touch()
    return path


@pytest.fixture
def agent(mode, peer, call_log, tmp_path, until):
    """``agent(pace)``: a connected agent process; all of them share one Z4J_HOME."""
    started = []

    def start(pace):
        before = len(peer.sessions)
        root = str(Path(z4j_bare.__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            AGENT,
            mode,
            peer.url,
            TOKEN,
            SECRET_TEXT,
            str(call_log),
            pace,
        ]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                bufsize=0,
                stdout=subprocess.DEVNULL,
            )
        )
        until(lambda: len(peer.sessions) > before and peer.sessions[-1].frames)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def results(peer):
    return [frame.payload for frame in peer.frames("command_result")]


def test_command_of_killed_process_is_indeterminate(peer, agent, call_log, until):
    """After SIGKILL the next process reports "outcome unknown" and does not run the command."""
    first = agent("hang")
    identity = peer.last.command("cancel_task", {"task_id": "t-1"}, token="tok")
    until(lambda: call_log.read_text() == "t-1\n")
    first.send_signal(signal.SIGKILL)
    first.wait()
    agent("quick")
    peer.last.command("cancel_task", {"task_id": "t-1"}, token="tok", identity=identity)
    until(lambda: peer.last.of("command_ack") and results(peer))
    other = peer.last.command("cancel_task", {"task_id": "t-2"})
    until(lambda: any(frame.id == other for frame in peer.frames("command_result")))
    found = [frame.payload for frame in peer.frames("command_result") if frame.id == identity]
    for payload in found:
        assert (payload.status, payload.delivery_claim_token) == ("failed", "tok")
        assert payload.result == {"indeterminate": True, "operation": "cancel_task"}
        assert "the agent ended before the command did" in payload.error
    assert found
    assert call_log.read_text() == "t-1\nt-2\n"


def test_fire_is_not_repeated_after_kill(peer, agent, call_log, until):
    """After SIGKILL during a fire no command enqueues it again; each reports "outcome unknown"."""
    fire = {"task_name": "t-1", "fire_id": "f-1", "args": [], "kwargs": {}}
    first = agent("hang")
    killed = peer.last.command("schedule.fire", fire)
    until(lambda: call_log.read_text() == "t-1\n")
    first.send_signal(signal.SIGKILL)
    first.wait()
    agent("quick")
    repeated = peer.last.command("schedule.fire", fire)
    other = peer.last.command("schedule.fire", {**fire, "task_name": "t-2", "fire_id": "f-2"})
    until(
        lambda: {killed, repeated, other} <= {frame.id for frame in peer.frames("command_result")}
    )
    found = {frame.id: frame.payload for frame in peer.frames("command_result")}
    for identity in (killed, repeated):
        assert found[identity].status == "failed"
        assert found[identity].result == {"indeterminate": True, "operation": "schedule.fire"}
    assert found[other].result == {"task": "t-2"}
    assert call_log.read_text() == "t-1\nt-2\n"
    assert peer.errors == []


def test_ledger_survives_clean_stop(peer, agent, call_log, until):
    """The next process repeats the result of a command that finished before a clean stop."""
    first = agent("quick")
    identity = peer.last.command("cancel_task", {"task_id": "t-1"})
    until(lambda: results(peer))
    first.stdin.write(b"stop\n")
    first.wait(timeout=30)
    agent("quick")
    peer.last.command("cancel_task", {"task_id": "t-1"}, identity=identity)
    until(lambda: len(results(peer)) == 2)
    assert [payload.result for payload in results(peer)] == [{"task": "t-1"}] * 2
    assert call_log.read_text() == "t-1\n"


def test_command_of_living_process_is_left_alone(peer, agent, call_log, until):
    """While one process runs a command, another one acknowledges it and does not run it."""
    agent("hang")
    first = peer.last
    identity = first.command("cancel_task", {"task_id": "t-1"})
    until(lambda: call_log.read_text() == "t-1\n")
    agent("quick")
    second = peer.last
    second.command("cancel_task", {"task_id": "t-1"}, identity=identity)
    other = second.command("cancel_task", {"task_id": "t-2"})
    until(lambda: [frame.id for frame in second.of("command_result")] == [other])
    assert {frame.id for frame in second.of("command_ack")} == {identity, other}
    assert call_log.read_text() == "t-1\nt-2\n"
