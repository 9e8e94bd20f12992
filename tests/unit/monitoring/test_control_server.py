"""How other processes find an agent and ask it: pid files, the desk, SIGHUP."""

import logging
import os
import signal
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.peer import SECRET_TEXT
from z4j_bare import AgentRuntime, control
from z4j_bare.monitoring import control_server as loop
from z4j_bare.monitoring.control_server import Desk

#: A pid that nobody has: the kernel's limit is below.
NOBODY = 2**22 + 1


@pytest.fixture
def serve(backend, until):
    """``serve(adapter, **answers)``: a desk that is open, until the end of the test."""
    stop_event, opened = backend.event(), []

    def start(adapter="bare", **answers):
        served = Desk(
            adapter,
            {word: lambda answer=answer: answer for word, answer in answers.items()},
            backend,
        )
        opened.append((served, backend.spawn(served.run, stop_event, name="desk")))
        until(lambda: served._listener)
        return served

    yield start
    stop_event.set()
    for served, task in opened:
        served.wake()
        assert task.join(10)
    assert control.list_clients() == []


@pytest.fixture
def ask(backend):
    """``ask(function, *args)``: call it as another process would, off the hub on which the desk is served."""

    def call(function, *args):
        ok, value = backend.offload(function, *args)
        if not ok:
            raise value
        return value

    return call


@pytest.fixture
def runtime():
    """``runtime()``: a started runtime that has no brain; all in this process."""
    from z4j_core.models import Config

    started = []

    def start():
        config = Config(
            brain_url="http://127.0.0.1:9", token="tok", project_id="demo", hmac_secret=SECRET_TEXT
        )
        engine = SimpleNamespace(name="stub", capabilities=set)
        made = AgentRuntime(
            config=config, framework=SimpleNamespace(name="fastapi"), engines=[engine]
        )
        made.start()
        started.append(made)
        return made

    yield start
    for made in started:
        made.stop(timeout=3)


def home():
    return Path(os.environ["Z4J_HOME"])


def test_a_pid_file_is_its_writers(monkeypatch):
    """The first process has the adapter's file, another live one a file beside it, and each removes its own alone."""
    first = control.write_pidfile("django")
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert first == control.pidfile_path("django") == home() / "agent-django.pid"
    assert first.read_text() == f"{os.getpid()}\n"
    ours = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: ours + 1)
    second = control.write_pidfile("django")
    assert second == home() / f"agent-django.{ours + 1}.pid"
    control.remove_pidfile("django")
    assert (first.exists(), second.exists()) == (True, False)
    monkeypatch.undo()
    monkeypatch.setenv("Z4J_HOME", str(first.parent))
    control.remove_pidfile("django")
    assert not first.exists()


@pytest.mark.parametrize("left", [f"{NOBODY}\n", "", "garbage", "-1"])
def test_a_stale_pid_file_is_taken_over(left):
    """What a dead process has left, or nobody can read, is no claim."""
    path = control.pidfile_path("bare")
    path.write_text(left)
    assert control.write_pidfile("bare") == path
    assert path.read_text() == f"{os.getpid()}\n"


def test_the_desk_answers(serve, ask):
    """Each agent of the home answers for itself, by adapter and pid, and only its user may ask."""
    serve("bare", status={"connected": True})
    serve("my.app/web", status={"connected": False, "note": "ü" * 200_000})
    first, second = ask(control.status)
    assert first == {"adapter": "bare", "pid": os.getpid(), "connected": True}
    assert (second["adapter"], second["connected"], len(second["note"])) == (
        "my_app_web",
        False,
        200_000,
    )
    assert [each.path.stat().st_mode & 0o777 for each in control.list_clients()] == [0o600, 0o600]


def test_a_word_that_it_does_not_know(serve, ask):
    """An unknown word, or none, is answered or let be; the next visitor is served."""
    serve(restart={}, status={"x": 1})
    (desk,) = control.list_clients()
    assert ask(desk.request, "explode") == {"error": "'explode' is none of restart, status"}
    for nonsense in ("x" * 10_000, ""):
        with pytest.raises(ConnectionResetError):
            ask(desk.request, nonsense)
    ask(desk.send, "status")
    assert ask(desk.request, "status") == {"x": 1}


def test_a_visitor_who_says_nothing(serve, ask, monkeypatch):
    """Somebody who holds the line in silence, or takes no answer, is sent away; the desk goes on."""
    monkeypatch.setattr(loop, "PATIENCE", 0.1)
    serve(status={"much": "x" * 5_000_000})
    (desk,) = control.list_clients()
    with control._connected(desk.path, 5.0) as silent, control._connected(desk.path, 5.0) as deaf:
        deaf.send(b"status\n")
        assert len(ask(desk.request, "status", 20.0)["much"]) == 5_000_000
        del silent


def test_restart_from_outside(serve, ask):
    """send_restart() tells every agent of the adapter, and says so; what the dead have left is removed."""
    dead = home() / f"agent-bare.{NOBODY}-0a.sock"
    serve("bare", restart={})
    serve("bare", restart={})
    serve("django", restart={"error": "no"})
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    (home() / f"agent-bare.{NOBODY}.pid").write_text(str(NOBODY))
    code, said = ask(control.send_restart, "bare")
    assert (code, said) == (
        0,
        f"process {os.getpid()}, {os.getpid()}: the agent closes its session and reconnects",
    )
    assert not dead.exists()
    assert not (home() / f"agent-bare.{NOBODY}.pid").exists()
    assert ask(control.send_restart, "django")[0] == 1


def test_restart_of_nobody():
    """Without an agent the answer names the directory, and no signal is sent to whoever is in a pid file."""
    control.pidfile_path("django").write_text(f"{os.getpid()}\n")
    assert control.send_restart("django") == (
        1,
        f"no django agent runs with Z4J_HOME={home()}",
    )
    assert control.pidfile_path("django").exists()


def test_a_desk_that_hangs(ask, monkeypatch):
    """An agent that accepts and does not answer is told of with its pid."""
    monkeypatch.setattr(control, "REQUEST_TIMEOUT", 0.2)
    monkeypatch.setattr(control.ControlClient.request, "__defaults__", (0.2,))
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.bind(str(control._runtime_dir() / "agent-bare.77-0.sock"))
        stuck.listen()
        code, said = ask(control.send_restart, "bare")
        assert (code, said) == (
            1,
            "no valid answer from process 77 (timed out); reconnecting: none",
        )
        (row,) = ask(control.status)
        assert (row["pid"], row["error"]) == (77, "timed out")


def test_a_long_home(serve, ask, monkeypatch, tmp_path):
    """A home whose path is longer than a socket's address may be serves as well."""
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / ("h" * 200)))
    serve(status={"x": 1})
    assert ask(control.status) == [{"adapter": "bare", "pid": os.getpid(), "x": 1}]


def test_a_home_that_cannot_be_written(backend, monkeypatch, tmp_path, caplog, until):
    """Without a place for it the agent goes on without a desk, and says so once."""
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "file"))
    stop_event = backend.event()
    task = backend.spawn(Desk("bare", {}, backend).run, stop_event, name="desk")
    until(lambda: "will not find this agent" in caplog.text)
    stop_event.set()
    assert task.join(10)


def test_sighup(serve, until, monkeypatch):
    """SIGHUP says restart at this process's desks, calls the handler that was there before, and stacks up no copies."""
    called, said = [], []
    before = signal.signal(signal.SIGHUP, lambda *_: called.append(1))
    try:
        served = serve()
        served._answers = {"restart": lambda: said.append(1) or {}}
        assert control.install_sighup_handler(None)
        assert control.install_sighup_handler(None)
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: said)
        assert (called, said) == ([1], [1])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_runtime_is_found_and_told(runtime, ask, until, mode):
    """A running agent tells how it is, connects anew when told, and leaves nothing behind when it stops."""
    running = runtime()
    until(lambda: control.list_clients("fastapi"))
    (row,) = ask(control.status)
    assert (row["adapter"], row["pid"], row["project"]) == ("fastapi", os.getpid(), "demo")
    assert (row["state"], row["connected"], row["concurrency"], row["buffered"]) == (
        "running",
        False,
        mode,
        0,
    )
    assert control.pidfile_path("fastapi").read_text() == f"{os.getpid()}\n"
    assert ask(control.send_restart, "fastapi")[0] == 0
    running.stop(timeout=3)
    assert control.list_clients() == []
    assert not control.pidfile_path("fastapi").exists()


def test_a_loser_leaves_the_winner_alone(runtime, ask, until):
    """FastAPI's way: a second runtime is started and stopped while the first one runs, which stays known and in service."""
    runtime()
    until(lambda: control.pidfile_path("fastapi").exists() and len(control.list_clients()) == 1)
    loser = runtime()
    until(lambda: len(control.list_clients()) == 2)
    loser.stop(timeout=3)
    assert len(control.list_clients()) == 1
    assert control.pidfile_path("fastapi").read_text() == f"{os.getpid()}\n"
    assert ask(control.send_restart, "fastapi")[0] == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_takes_nothing_away(runtime, ask, until):
    """A child that stops the runtime it has inherited removes neither the parent's desk nor its pid file."""
    running = runtime()
    until(lambda: control.list_clients("fastapi"))
    pid = os.fork()
    if pid == 0:
        try:
            running.stop(timeout=1)
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(control.list_clients()) == 1
    assert control.pidfile_path("fastapi").exists()
    assert ask(control.status)[0]["state"] == "running"
