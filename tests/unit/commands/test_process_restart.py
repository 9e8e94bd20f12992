"""``restart_worker`` by ending the process: the checks, the order of steps, and real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import z4j_bare
from tests.support.commands import CommandHarness
from z4j_bare.commands import process_restart
from z4j_bare.commands.process_restart import EXIT_CODE, ProcessRestart, is_caught
from z4j_bare.errors import CommandError
from z4j_bare.wire.command import CommandOutcome


class FakeClock:
    """The part of a backend that a process restart uses."""

    def __init__(self):
        self.time = 100.0
        self.slept = []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.slept.append(seconds)


@pytest.fixture
def restart(monkeypatch):
    """A permitted restart of the worker ``w``; ``steps`` records what it did, in order."""
    monkeypatch.setenv("Z4J_ORCHESTRATED", "1")
    clock, steps = FakeClock(), []
    monkeypatch.setattr(process_restart, "exit_now", lambda: steps.append("exit"))
    monkeypatch.setattr(process_restart, "set_exit_code", lambda _: steps.append("exit code set"))
    made = ProcessRestart(
        "stub", {"w"}, lambda seconds: steps.append(f"stop {seconds:g}"), clock, 30.0
    )
    clock.time += 61
    made.clock, made.steps = clock, steps
    return made


def test_command_for_another_worker_is_refused(restart):
    """The error names the process that the command reached; the process keeps running."""
    with pytest.raises(
        CommandError, match=f"this command reached pid {os.getpid()}, which is not v"
    ):
        restart.request("v")
    assert restart.request("w").status == "success"


def test_restart_without_supervisor_is_refused(restart, monkeypatch):
    """Without a supervisor the error says what to set, and the capability is not reported."""
    monkeypatch.setenv("Z4J_ORCHESTRATED", "0")
    with pytest.raises(
        CommandError, match=r"Z4J_ORCHESTRATED=0 says that nothing restarts pid \d+"
    ):
        restart.request("w")
    assert not restart.is_supervised
    monkeypatch.setenv("Z4J_ORCHESTRATED", "1")
    assert ProcessRestart("stub", (), print, restart.clock, 1.0).is_supervised


def test_restart_soon_after_start_is_refused(restart):
    """A process is not restarted within its first minute, and not twice."""
    restart.clock.time -= 60
    with pytest.raises(CommandError, match="has run for 1 s; it may be restarted after 60 s"):
        restart.request("w")
    restart.clock.time += 60
    restart.request("w")
    with pytest.raises(CommandError, match="already being restarted"):
        restart.request("w")


def test_worker_without_signal_handler_is_ended_directly(restart, monkeypatch):
    """Without a signal handler no signal is sent: the agent stops, then the process exits."""
    monkeypatch.setattr(process_restart, "is_caught", lambda _: False)
    outcome = restart.request("w")
    assert outcome.result == {
        "restarted_via": "self_exit", "worker_name": "w", "pid": os.getpid(),
        "supervisor": "Z4J_ORCHESTRATED=1", "exit_in_seconds": 35.0,
    }  # fmt: skip
    outcome.after_stored()
    assert (restart.steps, restart.clock.slept) == (["exit code set", "stop 5", "exit"], [])


@pytest.mark.parametrize(("engine", "number"), [("rq", signal.SIGTERM), ("huey", signal.SIGINT)])
def test_worker_gets_its_shutdown_signal(monkeypatch, restart, engine, number):
    """The engine's shutdown signal is sent first; the process is ended after the grace time."""
    monkeypatch.setattr(process_restart, "is_caught", lambda _: True)
    monkeypatch.setattr(os, "kill", lambda pid, sent: restart.steps.append((pid, sent)))
    restart._engine = engine
    restart.request("w").after_stored()
    assert restart.steps == ["exit code set", (os.getpid(), number), "stop 5", "exit"]
    assert restart.clock.slept == [30.0]


def test_result_is_stored_before_restart_begins():
    """The dispatcher calls ``after_stored`` after it stored the result."""
    harness, stored = CommandHarness(), []
    request = lambda worker: CommandOutcome.success(  # noqa: E731
        {"worker_name": worker}, lambda: stored.append(len(harness.results))
    )
    harness.host.process_restart = SimpleNamespace(request=request)
    harness.host.capabilities = list
    assert harness.run("restart_worker", {"worker_name": "w"})["result"] == {"worker_name": "w"}
    assert stored == [1]


def test_refused_restart_is_a_failed_result():
    """A refusal becomes a failed result, and the process keeps running."""
    harness = CommandHarness()
    harness.host.process_restart = ProcessRestart(
        "celery", {"w"}, lambda _: None, harness.backend, 1.0
    )
    body = harness.run("restart_worker", {"worker_name": "ghost"})
    assert (body["status"], body["error"]) == (
        "failed",
        f"this command reached pid {os.getpid()}, which is not ghost",
    )


def test_is_caught_sees_handlers_in_c(tmp_path):
    """The kernel's list of caught signals is used; Python's own is the fallback."""
    (tmp_path / "status").write_text("Name:\tx: y\nSigIgn:\t0\nSigCgt:\t0000000000004000\n")
    assert is_caught(signal.SIGTERM, tmp_path / "status")
    assert not is_caught(signal.SIGINT, tmp_path / "status")
    for bad in ("", "nothing here", "SigCgt:\tx"):
        (tmp_path / "status").write_text(bad)
        assert not is_caught(signal.SIGUSR1, tmp_path / "status")
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job of a shell ignores SIGINT
    try:
        assert is_caught(signal.SIGINT, tmp_path / "gone")
    finally:
        signal.signal(signal.SIGINT, before)


HOST = """
import atexit, os, signal, sys, time
from tests.launch import patch
patch(sys.argv[1])
atexit.register(lambda: os.write(1, b"an exit hook of the host\\n"))
from tests.support.peer import Peer, SECRET_TEXT, TOKEN
from z4j_bare import install_agent
from z4j_bare.concurrency import build
from tests.support.engines import FakeEngine
from z4j_bare.commands import process_restart
process_restart.MIN_UPTIME = 0

backend = build(sys.argv[1])
peer = Peer(backend)
import threading
# Beyond the end of the interpreter the thread holds the globals of the module, not the module.
holder = threading.Thread(
    target=lambda _: time.sleep(60), args=(process_restart.exit_now,), daemon=True
)
holder.start()
del process_restart
signalled = []
if sys.argv[2] != "without handler":
    signal.signal(signal.SIGTERM, lambda *_: signalled.append(1))
runtime = install_agent(
    engines=[FakeEngine()],
    brain_url=peer.url,
    token=TOKEN,
    project_id="p",
    hmac_secret=SECRET_TEXT,
)
runtime._agent.engines.sources[0].presence.online("w")

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        backend.sleep(0.02)

def check_worker_offline():
    batches = peer.frames("event_batch")
    kinds = [event["kind"] for batch in batches for event in batch.payload.events]
    state = b"sent" if "worker.offline" in kinds else b"missing"
    os.write(1, b"worker.offline " + state + b"\\n")

stop = runtime._agent.stop
def stop_and_check(seconds):
    stop(seconds)
    check_worker_offline()
runtime._agent.stop = stop_and_check
if runtime._agent.engines.hosts["stub"].process_restart:
    runtime._agent.engines.hosts["stub"].process_restart._stop = stop_and_check

until(lambda: peer.frames("heartbeat"))
assert peer.last.hello.payload.capabilities == {"stub": ["restart_worker"]}
peer.last.command("restart_worker", {"worker_name": "w", "engine": "stub"})
until(lambda: peer.frames("command_result"))
print(peer.frames("command_result")[0].payload.status, flush=True)
until(lambda: signalled)
if sys.argv[2] == "busy":
    print("busy", flush=True)
    backend.sleep(20)
    print("too long", flush=True)
"""


@pytest.mark.parametrize("worker", ["obedient", "without handler", "busy"])
def test_process_exits_with_restart_code(mode, worker):
    """The process stores the result, sends ``worker.offline`` and exits with ``EXIT_CODE``.

    An obedient worker runs its own exit hooks; a busy one and one without a handler are ended.
    """
    env = {
        **os.environ,
        "Z4J_ORCHESTRATED": "1",
        "Z4J_RESTART_GRACE_SECONDS": "1",
        "Z4J_FLUSH_SECONDS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", HOST, mode, worker]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    hooks = ["an exit hook of the host"] if worker == "obedient" else []
    expected = ["success", *(["busy"] if worker == "busy" else []), "worker.offline sent", *hooks]
    assert (done.returncode, done.stdout.splitlines()) == (EXIT_CODE, expected), done.stderr
    assert "Traceback" not in done.stderr


CHILD = """
import multiprocessing, sys
from z4j_bare.commands.process_restart import set_exit_code, exit_now

def work():
    set_exit_code(lambda: (print("finished", flush=True), exit_now()))

if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    child.start()
    child.join()
    print(child.exitcode)
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_multiprocessing_child_exits_with_restart_code(start_method, tmp_path):
    """In a child of multiprocessing, which runs no ``atexit`` hooks, the last finalizer exits."""
    (tmp_path / "master.py").write_text(CHILD)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "master.py"), start_method]
    env = {**os.environ, "PYTHONPATH": str(Path(z4j_bare.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.stdout.split() == ["finished", str(EXIT_CODE)], done.stderr
