"""A process is killed in the middle of a command: the next one answers for it, and nobody runs it again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import z4j_bare
from tests.support.peer import SECRET_TEXT, TOKEN

pytestmark = pytest.mark.thorough

#: An agent whose engine writes down each call and hangs in it, unless it is told to be quick.
AGENT = """
import select, sys
mode, url, token, secret, diary, pace = sys.argv[1:]
if mode == "gevent":
    from gevent import monkey; monkey.patch_all()
if mode == "eventlet":
    import eventlet; eventlet.monkey_patch()
import time
from z4j_core.models import CommandResult
from z4j_bare import install_agent

class Engine:
    name = "stub"
    def capabilities(self):
        return {"cancel_task", "submit_task"}
    async def submit_task(self, name, **_options):
        return await self.cancel_task(name)
    async def cancel_task(self, task_id):
        with open(diary, "a") as file:
            file.write(task_id + "\\n")
        if pace == "hang":
            time.sleep(60)
        return CommandResult(status="success", result={"task": task_id})

runtime = install_agent(engines=[Engine()], brain_url=url, token=token, project_id="demo", hmac_secret=secret)
while not select.select([sys.stdin], [], [], 0)[0]:
    time.sleep(0.05)
runtime.stop(timeout=5)
"""


@pytest.fixture
def diary(tmp_path):
    path = tmp_path / "diary"
    path.touch()
    return path


@pytest.fixture
def agent(mode, peer, diary, tmp_path, until):
    """``agent(pace)``: a process with a session of its own; they share one Z4J_HOME."""
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
            str(diary),
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


def test_killed_between_started_and_done(peer, agent, diary, until):
    """After a SIGKILL in the middle of a command the next process answers that its outcome is unknown; it never runs it."""
    first = agent("hang")
    identity = peer.last.command("cancel_task", {"task_id": "t-1"}, token="tok")
    until(lambda: diary.read_text() == "t-1\n")
    first.send_signal(signal.SIGKILL)
    first.wait()
    agent("quick")
    peer.last.command("cancel_task", {"task_id": "t-1"}, token="tok", identity=identity)
    until(lambda: peer.last.of("command_ack") and results(peer))
    other = peer.last.command("cancel_task", {"task_id": "t-2"})
    until(lambda: any(frame.id == other for frame in peer.frames("command_result")))
    answers = [frame.payload for frame in peer.frames("command_result") if frame.id == identity]
    for answer in answers:
        assert (answer.status, answer.delivery_claim_token) == ("failed", "tok")
        assert answer.result == {"indeterminate": True, "operation": "cancel_task"}
        assert "the agent ended before the command did" in answer.error
    assert answers
    assert diary.read_text() == "t-1\nt-2\n"


def test_a_fire_is_not_repeated_after_a_kill(peer, agent, diary, until):
    """After a SIGKILL in the middle of a fire neither its command nor another one enqueues it again; both outcomes are unknown."""
    fire = {"task_name": "t-1", "fire_id": "f-1", "args": [], "kwargs": {}}
    first = agent("hang")
    began = peer.last.command("schedule.fire", fire)
    until(lambda: diary.read_text() == "t-1\n")
    first.send_signal(signal.SIGKILL)
    first.wait()
    agent("quick")
    again = peer.last.command("schedule.fire", fire)
    other = peer.last.command("schedule.fire", {**fire, "task_name": "t-2", "fire_id": "f-2"})
    until(lambda: {began, again, other} <= {frame.id for frame in peer.frames("command_result")})
    answers = {frame.id: frame.payload for frame in peer.frames("command_result")}
    for identity in (began, again):
        assert answers[identity].status == "failed"
        assert answers[identity].result == {"indeterminate": True, "operation": "schedule.fire"}
    assert answers[other].result == {"task": "t-2"}
    assert diary.read_text() == "t-1\nt-2\n"
    assert peer.mishaps == []


def test_the_ledger_survives_a_clean_stop(peer, agent, diary, until):
    """A command that was done before an orderly stop is answered by the next process as it was, and not repeated."""
    first = agent("quick")
    identity = peer.last.command("cancel_task", {"task_id": "t-1"})
    until(lambda: results(peer))
    first.stdin.write(b"stop\n")
    first.wait(timeout=30)
    agent("quick")
    peer.last.command("cancel_task", {"task_id": "t-1"}, identity=identity)
    until(lambda: len(results(peer)) == 2)
    assert [answer.result for answer in results(peer)] == [{"task": "t-1"}] * 2
    assert diary.read_text() == "t-1\n"


def test_a_living_process_has_it(peer, agent, diary, until):
    """A command that comes to a second process while the first still runs it is acknowledged there, and left alone."""
    agent("hang")
    first = peer.last
    identity = first.command("cancel_task", {"task_id": "t-1"})
    until(lambda: diary.read_text() == "t-1\n")
    agent("quick")
    second = peer.last
    second.command("cancel_task", {"task_id": "t-1"}, identity=identity)
    other = second.command("cancel_task", {"task_id": "t-2"})
    until(lambda: [frame.id for frame in second.of("command_result")] == [other])
    assert {frame.id for frame in second.of("command_ack")} == {identity, other}
    assert diary.read_text() == "t-1\nt-2\n"
