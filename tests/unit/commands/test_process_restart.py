"""restart_worker of an engine that has none: the gates, the order of things, and a real process that ends by it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import z4j_bare
from tests.unit.commands.test_dispatcher import Commanded
from z4j_bare.commands import process_restart
from z4j_bare.commands.process_restart import EXIT_CODE, ProcessRestart, RestartAccepted, is_caught
from z4j_bare.errors import CommandError


class Clock:
    """A backend as far as a departure needs one."""

    def __init__(self):
        self.time = 100.0
        self.slept = []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.slept.append(seconds)


@pytest.fixture
def way_out(monkeypatch):
    """A departure that is allowed to, of the worker ``w``; ``did`` is what it did, in order."""
    monkeypatch.setenv("Z4J_ORCHESTRATED", "1")
    clock, did = Clock(), []
    monkeypatch.setattr(process_restart, "leave_now", lambda: did.append("leave"))
    monkeypatch.setattr(process_restart, "end_with_failure", lambda _: did.append("armed"))
    made = ProcessRestart(
        "stub", {"w"}, lambda seconds: did.append(f"stop {seconds:g}"), clock, 30.0
    )
    clock.time += 61
    made.clock, made.did = clock, did
    return made


def test_another_workers_command(way_out):
    """A command for a worker that this process is not says which process it reached, and nothing happens."""
    with pytest.raises(
        CommandError, match=f"this command reached pid {os.getpid()}, which is not v"
    ):
        way_out.order("v")
    assert way_out.order("w").status == "success"


def test_without_a_supervisor(way_out, monkeypatch):
    """Where nothing would start the process again it stays, the answer says what to do, and the brain is told of no ability."""
    monkeypatch.setenv("Z4J_ORCHESTRATED", "0")
    with pytest.raises(
        CommandError, match=r"Z4J_ORCHESTRATED=0 says that nothing starts pid \d+ again"
    ):
        way_out.order("w")
    assert not way_out.possible
    monkeypatch.setenv("Z4J_ORCHESTRATED", "1")
    assert ProcessRestart("stub", (), print, way_out.clock, 1.0).possible


def test_no_crash_loop(way_out):
    """A process that has just come up is not restarted, and one that is on its way out not twice."""
    way_out.clock.time -= 60
    with pytest.raises(CommandError, match="runs for 1 s; it may be restarted after 60 s"):
        way_out.order("w")
    way_out.clock.time += 60
    way_out.order("w")
    with pytest.raises(CommandError, match="on its way out"):
        way_out.order("w")


def test_a_worker_that_knows_no_signal(way_out, monkeypatch):
    """Without a handler for it no signal is sent: the agent stops by itself, and then the process ends."""
    monkeypatch.setattr(process_restart, "is_caught", lambda _: False)
    leaving = way_out.order("w")
    assert leaving.result == {
        "restarted_via": "self_exit", "worker_name": "w", "pid": os.getpid(), "supervisor": "Z4J_ORCHESTRATED=1", "exit_in_seconds": 35.0
    }  # fmt: skip
    leaving.then()
    assert (way_out.did, way_out.clock.slept) == (["armed", "stop 5", "leave"], [])


@pytest.mark.parametrize(("engine", "number"), [("rq", signal.SIGTERM), ("huey", signal.SIGINT)])
def test_a_worker_that_finishes_at_a_signal(monkeypatch, way_out, engine, number):
    """The engine's own signal comes first, and the end by force only when the worker's time is over."""
    monkeypatch.setattr(process_restart, "is_caught", lambda _: True)
    monkeypatch.setattr(os, "kill", lambda pid, sent: way_out.did.append((pid, sent)))
    way_out._engine = engine
    way_out.order("w").then()
    assert way_out.did == ["armed", (os.getpid(), number), "stop 5", "leave"]
    assert way_out.clock.slept == [30.0]


def test_the_answer_first():
    """The dispatcher begins the departure when the answer is stored, not before."""
    world, found = Commanded(), []
    order = lambda worker: RestartAccepted(  # noqa: E731
        {"worker_name": worker}, lambda: found.append(len(world.answers))
    )
    world.host.process_restart = SimpleNamespace(order=order)
    world.host.capabilities = list
    assert world.answer("restart_worker", {"worker_name": "w"})["result"] == {"worker_name": "w"}
    assert found == [1]


def test_a_refusal_is_an_answer():
    """What a departure refuses is told as a failure, and nobody leaves."""
    world = Commanded()
    world.host.process_restart = ProcessRestart("celery", {"w"}, lambda _: None, world.backend, 1.0)
    answer = world.answer("restart_worker", {"worker_name": "ghost"})
    assert (answer["status"], answer["error"]) == (
        "failed",
        f"this command reached pid {os.getpid()}, which is not ghost",
    )


def test_handlers_in_c(tmp_path):
    """The kernel knows which signals are caught; where it does not tell, Python's own table has to do."""
    (tmp_path / "status").write_text("Name:\tx: y\nSigIgn:\t0\nSigCgt:\t0000000000004000\n")
    assert is_caught(signal.SIGTERM, tmp_path / "status")
    assert not is_caught(signal.SIGINT, tmp_path / "status")
    for bad in ("", "nothing here", "SigCgt:\tx"):
        (tmp_path / "status").write_text(bad)
        assert not is_caught(signal.SIGUSR1, tmp_path / "status")
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it
    try:
        assert is_caught(signal.SIGINT, tmp_path / "gone")
    finally:
        signal.signal(signal.SIGINT, before)


HOST = """
import atexit, os, signal, sys, time
from tests.launch import patch
patch(sys.argv[1])
atexit.register(lambda: os.write(1, b"the host's hook, which is older than the agent\\n"))
from tests.support.peer import Peer, SECRET_TEXT, TOKEN
from z4j_bare import install_agent
from z4j_bare.concurrency import build
from z4j_bare.commands import process_restart as departure
departure.MIN_UPTIME = 0

class Engine:
    name = "stub"
    def capabilities(self):
        return set()

backend = build(sys.argv[1])
peer = Peer(backend)
import threading
threading.Thread(target=lambda _: time.sleep(60), args=(departure.leave_now,), daemon=True).start()
del departure  # whose globals, but not the module, are held beyond the interpreter's end
ended = []
if sys.argv[2] != "deaf":
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
runtime = install_agent(engines=[Engine()], brain_url=peer.url, token=TOKEN, project_id="p", hmac_secret=SECRET_TEXT)
runtime._agent.sources[0].presence.online("w")

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        backend.sleep(0.02)

def told(*_):
    kinds = [event["kind"] for batch in peer.frames("event_batch") for event in batch.payload.events]
    os.write(1, b"worker.offline told\\n" if "worker.offline" in kinds else b"worker.offline missing\\n")

stop = runtime._agent.stop
def watched(seconds):
    stop(seconds)
    told()
runtime._agent.stop = watched
if runtime._agent.hosts["stub"].process_restart:
    runtime._agent.hosts["stub"].process_restart._stop = watched

until(lambda: peer.frames("heartbeat"))
assert peer.last.hello.payload.capabilities == {"stub": ["restart_worker"]}
peer.last.command("restart_worker", {"worker_name": "w", "engine": "stub"})
until(lambda: peer.frames("command_result"))
print(peer.frames("command_result")[0].payload.status, flush=True)
until(lambda: ended)
if sys.argv[2] == "busy":
    print("busy", flush=True)
    backend.sleep(20)
    print("too long", flush=True)
"""


@pytest.mark.parametrize("kind", ["polite", "deaf", "busy"])
def test_a_process_ends(mode, kind):
    """However its host takes the signal, the process answers, says good-bye and ends with the code that gets it restarted.

    One that obeys runs its own exit hooks; one that goes on too long, or knows no signal, is ended.
    """
    env = {
        **os.environ,
        "Z4J_ORCHESTRATED": "1",
        "Z4J_RESTART_GRACE_SECONDS": "1",
        "Z4J_FLUSH_SECONDS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", HOST, mode, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    own = ["the host's hook, which is older than the agent"] if kind == "polite" else []
    said = ["success", *(["busy"] if kind == "busy" else []), "worker.offline told", *own]
    assert (done.returncode, done.stdout.splitlines()) == (EXIT_CODE, said), done.stderr
    assert "Traceback" not in done.stderr


CHILD = """
import multiprocessing, sys
from z4j_bare.commands.process_restart import end_with_failure, leave_now

def work():
    end_with_failure(lambda: (print("finished", flush=True), leave_now()))

if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    child.start()
    child.join()
    print(child.exitcode)
"""


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_a_child_of_multiprocessing(way, tmp_path):
    """Dramatiq's and taskiq's workers end without the interpreter's exit: the agent's end is the last of their hooks."""
    (tmp_path / "master.py").write_text(CHILD)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "master.py"), way]
    env = {**os.environ, "PYTHONPATH": str(Path(z4j_bare.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.stdout.split() == ["finished", str(EXIT_CODE)], done.stderr
