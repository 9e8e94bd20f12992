"""Control of a running agent from other processes: pid files, control socket and SIGHUP."""

import logging
import os
import signal
import socket
import stat
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from z4j_core.models import Event, EventKind

from tests.support.peer import SECRET_TEXT
from z4j_bare import AgentRuntime, control
from z4j_bare.monitoring import control_server
from z4j_bare.monitoring.control_server import ControlServer
from z4j_bare.monitoring.openmetrics import LIVE, Snapshot, families_of, render

#: A pid that no process can have, because the kernel's limit is lower.
UNUSED_PID = 2**22 + 1


@pytest.fixture
def off_hub(backend):
    """``off_hub(function, *args)``: call a client's function off the hub of the server."""

    def call(function, *args):
        ok, value = backend.offload(function, *args)
        if not ok:
            raise value
        return value

    return call


@pytest.fixture
def runtime():
    """``runtime()``: a started runtime in this process, without a brain."""
    from z4j_core.models import Config

    started = []

    def start():
        config = Config(
            brain_url="http://127.0.0.1:9", token="tok", project_id="demo", hmac_secret=SECRET_TEXT
        )
        engine = SimpleNamespace(name="stub", capabilities=set)
        created = AgentRuntime(
            config=config, framework=SimpleNamespace(name="fastapi"), engines=[engine]
        )
        created.start()
        started.append(created)
        return created

    yield start
    for created in started:
        created.stop(timeout=3)


def home():
    """Return the ``Z4J_HOME`` of this test."""
    return Path(os.environ["Z4J_HOME"])


def test_each_process_has_its_own_pid_file(monkeypatch):
    """A second live process writes a file of its own, and each removes only its own file."""
    first = control.write_pidfile("django")
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert first == control.pidfile_path("django") == home() / "agent-django.pid"
    assert first.read_text() == f"{os.getpid()}\n"
    own_pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: own_pid + 1)
    second = control.write_pidfile("django")
    assert second == home() / f"agent-django.{own_pid + 1}.pid"
    control.remove_pidfile("django")
    assert (first.exists(), second.exists()) == (True, False)
    monkeypatch.undo()
    monkeypatch.setenv("Z4J_HOME", str(first.parent))
    control.remove_pidfile("django")
    assert not first.exists()


@pytest.mark.parametrize("content", [f"{UNUSED_PID}\n", "", "garbage", "-1"])
def test_stale_pid_file_is_replaced(content):
    """The file of an ended process is replaced, and so is an invalid one."""
    path = control.pidfile_path("bare")
    path.write_text(content)
    assert control.write_pidfile("bare") == path
    assert path.read_text() == f"{os.getpid()}\n"


def test_status_lists_every_agent_of_home(serve, off_hub):
    """Each agent answers with its adapter and pid, on a socket that only its user may open."""
    serve("bare", status={"connected": True})
    serve("my.app/web", status={"connected": False, "note": "ü" * 200_000})
    first, second = off_hub(control.status)
    assert first == {"adapter": "bare", "pid": os.getpid(), "connected": True}
    assert (second["adapter"], second["connected"], len(second["note"])) == (
        "my_app_web",
        False,
        200_000,
    )
    assert [client.path.stat().st_mode & 0o777 for client in control.list_clients()] == [
        0o600,
        0o600,
    ]


def test_server_rejects_unknown_verb_and_continues(serve, off_hub):
    """An unknown verb gets an error, an invalid request no answer; the next client is served."""
    serve(restart={}, status={"x": 1})
    (client,) = control.list_clients()
    assert off_hub(client.request, "explode") == {
        "error": "'explode' is not one of restart, status"
    }
    for nonsense in ("x" * 10_000, ""):
        with pytest.raises(ConnectionResetError):
            off_hub(client.request, nonsense)
    off_hub(client.send, "status")
    assert off_hub(client.request, "status") == {"x": 1}


def test_request_has_parameters(serve, off_hub):
    """The parameters of a request reach its handler; wrong ones get an error."""
    server = serve()
    server._handlers = {"tasks": lambda task="": {"task": task}}
    (client,) = control.list_clients()
    assert off_hub(client.request, "tasks", 5.0, {"task": "ü"}) == {"task": "ü"}
    assert "no such parameters" in off_hub(client.request, "tasks", 5.0, {"x": 1})["error"]
    assert "no such parameters" in off_hub(client.request, "tasks [}")["error"]


def test_large_response_is_sent_in_parts(serve, off_hub, monkeypatch):
    """A response is read from its iterator only as fast as the client reads."""
    monkeypatch.setattr(control_server, "CLIENT_TIMEOUT", 0.1)
    produced = []

    def parts():
        yield "["
        for number in range(2000):
            produced.append(number)
            yield f'"{"x" * 1000}", '
        yield "0]"

    server = serve()
    server._handlers = {"tasks": parts}
    (client,) = control.list_clients()
    with control._connected(client.path, 5.0) as silent:
        silent.send(b"tasks\n")
        assert len(off_hub(client.request, "tasks", 20.0)) == 2001
    assert 2000 < len(produced) < 4000


def test_failed_request_is_logged_and_server_continues(serve, off_hub, caplog):
    """An error in a handler closes that connection only."""

    def fail():
        raise RuntimeError("broken")
        yield ""

    server = serve()
    server._handlers = {"tasks": fail, "status": lambda: {"x": 1}}
    (client,) = control.list_clients()
    with pytest.raises(ConnectionResetError):
        off_hub(client.request, "tasks")
    assert "a request failed" in caplog.text
    assert off_hub(client.request, "status") == {"x": 1}


def test_process_of_another_user_is_refused(serve, off_hub, monkeypatch):
    """A client whose process belongs to another user gets no answer."""
    serve(status={"x": 1})
    (client,) = control.list_clients()
    own_user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own_user + 1)
    monkeypatch.setattr(control_server, "_ROOT", own_user + 2)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        off_hub(client.request, "status")


def test_inspection_can_be_disabled(runtime, off_hub, until, monkeypatch):
    """``Z4J_INSPECT=0`` refuses the requests with the reason; ``status`` still works."""
    monkeypatch.setenv("Z4J_INSPECT", "0")
    runtime()
    until(lambda: control.list_clients("fastapi"))
    for verb in (control.TASKS, control.HUB, control.LOG, control.METRICS):
        (row,) = off_hub(control.query, verb)
        assert "Z4J_INSPECT=0" in row["error"]
    (row,) = off_hub(control.status)
    assert row["state"] == "running"


def test_running_agent_lists_no_tasks_of_unknown_engine(runtime, off_hub, until, mode):
    """An agent without Celery answers with an empty list, and with the lag of its hub."""
    runtime()
    until(lambda: control.list_clients("fastapi"))
    (row,) = off_hub(control.query, control.TASKS)
    assert (row["schema"], row["concurrency"], row["tasks"]) == (1, mode, [])
    (row,) = off_hub(control.query, control.HUB)
    assert (row["has_hub"], row["holds"]) == (mode != "threads", [])


def test_running_agent_answers_with_metrics(runtime, off_hub, until, monkeypatch):
    """An agent answers with counts of its events and tasks, from which the text is made."""
    started = runtime()
    until(lambda: control.list_clients("fastapi"))
    event = Event(
        id=uuid4(),
        project_id=uuid4(),
        agent_id=uuid4(),
        engine="stub",
        task_id="t",
        kind=EventKind.TASK_FAILED,
        occurred_at=datetime.now(UTC),
        data={"task_name": "jobs.mail", "exception": "OSError"},
    )
    started.record_event(event)
    (row,) = until(
        lambda: [each for each in off_hub(control.query, control.METRICS) if each["tasks"]]
    )
    assert row["tasks"][0]["failed"] == {"OSError": 1}
    assert row["engines"][0]["engine"] == "stub"
    text = render(families_of([Snapshot(row, LIVE)]))
    assert 'z4j_agent_task_failed_total{engine="stub",name="jobs.mail"' in text
    assert "z4j_agent_events_produced_total{" in text


def test_server_disconnects_silent_client_after_timeout(serve, off_hub, monkeypatch):
    """A client that sends no request or reads no response does not block the others for long."""
    monkeypatch.setattr(control_server, "CLIENT_TIMEOUT", 0.1)
    serve(status={"much": "x" * 5_000_000})
    (client,) = control.list_clients()
    with (
        control._connected(client.path, 5.0) as silent,
        control._connected(client.path, 5.0) as reader,
    ):
        reader.send(b"status\n")
        assert len(off_hub(client.request, "status", 20.0)["much"]) == 5_000_000
        del silent


def test_send_restart_reaches_all_agents_of_adapter(serve, off_hub):
    """send_restart() reports the processes, and removes sockets and pid files of ended ones."""
    stale = home() / f"agent-bare.{UNUSED_PID}-0a.sock"
    serve("bare", restart={})
    serve("bare", restart={})
    serve("django", restart={"error": "no"})
    with socket.socket(socket.AF_UNIX) as unused:
        unused.bind(str(stale))
    (home() / f"agent-bare.{UNUSED_PID}.pid").write_text(str(UNUSED_PID))
    code, message = off_hub(control.send_restart, "bare")
    assert (code, message) == (
        0,
        f"process {os.getpid()}, {os.getpid()}: the agent closes its session and reconnects",
    )
    assert not stale.exists()
    assert not (home() / f"agent-bare.{UNUSED_PID}.pid").exists()
    assert off_hub(control.send_restart, "django")[0] == 1


def test_send_restart_without_agent_names_home():
    """The message names the directory, and no signal is sent to the process of a pid file."""
    control.pidfile_path("django").write_text(f"{os.getpid()}\n")
    assert control.send_restart("django") == (
        1,
        f"no django agent runs with Z4J_HOME={home()}",
    )
    assert control.pidfile_path("django").exists()


def test_agent_that_does_not_answer_is_reported_with_pid(off_hub, monkeypatch):
    """An agent that accepts the connection and sends nothing is reported as timed out."""
    monkeypatch.setattr(control, "REQUEST_TIMEOUT", 0.2)
    monkeypatch.setattr(control.ControlClient.request, "__defaults__", (0.2,))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control._runtime_dir() / "agent-bare.77-0.sock"))
        listener.listen()
        code, message = off_hub(control.send_restart, "bare")
        assert (code, message) == (
            1,
            "no valid answer from process 77 (timed out); reconnecting: none",
        )
        (row,) = off_hub(control.status)
        assert (row["pid"], row["error"]) == (77, "timed out")


def test_socket_of_other_user_is_explained(serve, off_hub, monkeypatch):
    """If this user may not open a socket, the error names the fix."""

    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied")

    serve(status={"x": 1})
    monkeypatch.setattr(control.ControlClient, "request", refuse)
    (row,) = off_hub(control.status)
    assert row["error"] == ("this user may not use the agent's socket: run the command as its user")


def test_server_works_in_home_with_long_path(serve, off_hub, monkeypatch, tmp_path):
    """The path of ``Z4J_HOME`` may be longer than the address of a socket."""
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / ("h" * 200)))
    serve(status={"x": 1})
    assert off_hub(control.status) == [{"adapter": "bare", "pid": os.getpid(), "x": 1}]


def test_agent_runs_without_control_socket(backend, monkeypatch, tmp_path, caplog, until):
    """If ``Z4J_HOME`` is not writable, the agent logs that it cannot be controlled."""
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("z4j_bare.home.temporary_directories", list)  # nothing replaces Z4J_HOME
    stop_event = backend.event()
    task = backend.spawn(ControlServer("bare", {}, backend).run, stop_event, name="control")
    until(lambda: "cannot reach this agent" in caplog.text)
    stop_event.set()
    assert task.join(10)


def test_sighup_restarts_agents_of_process(serve, until, monkeypatch):
    """SIGHUP restarts the agents of the process once and calls the previous handler once."""
    called, restarts = [], []
    before = signal.signal(signal.SIGHUP, lambda *_: called.append(1))
    try:
        server = serve()
        server._handlers = {"restart": lambda: restarts.append(1) or {}}
        assert control.install_sighup_handler(None)
        assert control.install_sighup_handler(None)
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: restarts)
        assert (called, restarts) == ([1], [1])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_running_agent_reports_status_and_reconnects(runtime, off_hub, until, mode):
    """A running agent answers status and restart, and removes its files when it stops."""
    running = runtime()
    until(lambda: control.list_clients("fastapi"))
    (row,) = off_hub(control.status)
    assert (row["adapter"], row["pid"], row["project"]) == ("fastapi", os.getpid(), "demo")
    assert (row["state"], row["connected"], row["concurrency"], row["buffered"]) == (
        "running",
        False,
        mode,
        0,
    )
    assert control.pidfile_path("fastapi").read_text() == f"{os.getpid()}\n"
    assert off_hub(control.send_restart, "fastapi")[0] == 0
    running.stop(timeout=3)
    assert control.list_clients() == []
    assert not control.pidfile_path("fastapi").exists()


def test_stopping_second_runtime_leaves_first_one_reachable(runtime, off_hub, until):
    """FastAPI starts and stops a second runtime while the first one runs."""
    runtime()
    until(lambda: control.pidfile_path("fastapi").exists() and len(control.list_clients()) == 1)
    second = runtime()
    until(lambda: len(control.list_clients()) == 2)
    second.stop(timeout=3)
    assert len(control.list_clients()) == 1
    assert control.pidfile_path("fastapi").read_text() == f"{os.getpid()}\n"
    assert off_hub(control.send_restart, "fastapi")[0] == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_keeps_files_of_parent(runtime, off_hub, until):
    """A child that stops its copy of the runtime removes neither socket nor pid file."""
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
    assert off_hub(control.status)[0]["state"] == "running"


@pytest.fixture
def sighup():
    """``sighup(action)``: set the action for SIGHUP until the end of the test."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda action: signal.signal(signal.SIGHUP, action)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("adapter", "action", "has_file"),
    [
        ("bare", signal.SIG_DFL, False),
        ("bare", signal.SIG_IGN, True),
        ("bare", lambda *_args: None, True),
        ("django", signal.SIG_DFL, True),
    ],
    ids=["plain-default", "plain-ignored", "plain-handled", "framework"],
)
def test_plain_process_that_sighup_would_end_has_no_pid_file(
    serve, sighup, adapter, action, has_file
):
    """``kill -HUP`` to the pid in ``agent-bare.pid`` ends no process; commands reach the agent."""
    sighup(action)
    serve(adapter, status={})
    assert control.pidfile_path(adapter).exists() is has_file
    assert len(control.list_clients(adapter)) == 1


def test_pid_files_of_ended_processes_are_removed(serve, off_hub):
    """The next agent removes them, and so does ``status``; other adapters are included."""
    left = [home() / name for name in ("agent-bare.pid", "agent-django.pid")]
    left += [home() / f"agent-bare.{UNUSED_PID + number}.pid" for number in range(45)]
    control.ensure_home()
    for number, path in enumerate(left):
        path.write_text(str(UNUSED_PID + number))
    serve("flask")
    assert [path.name for path in home().glob("*.pid")] == ["agent-flask.pid"]
    left[0].write_text(str(UNUSED_PID))
    off_hub(control.status)
    assert not left[0].exists()


def test_pid_file_of_process_in_other_container_is_kept(serve):
    """A pid that does not exist here may exist in a container that shares the directory."""
    control.ensure_home()
    kept = home() / f"agent-bare.{UNUSED_PID}.pid"
    kept.write_text(str(UNUSED_PID))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(home() / f"agent-bare.{UNUSED_PID}-0a.sock"))
        other.listen()
        control.remove_stale_pidfiles()
        assert kept.exists()
    (home() / f"agent-bare.{UNUSED_PID}-0a.sock").unlink()


def test_socket_appears_when_it_listens(serve):
    """A client never finds a socket that refuses its connection, which it would remove."""
    serve("bare", status={})
    (client,) = control.list_clients()
    assert not control._remove_if_stale(client)
    assert not list(home().glob("*.tmp"))
