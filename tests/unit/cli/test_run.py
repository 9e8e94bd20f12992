"""``z4j-bare run``: settings, engines, signals, systemd, logs and exit codes."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.support.environment import set_connection
from tests.support.peer import SECRET_TEXT, TOKEN, Peer
from z4j_bare import RuntimeState
from z4j_bare import _process_singleton as singleton
from z4j_bare.cli import adapters, configuration, logs, main
from z4j_bare.cli import run as run_command
from z4j_bare.cli.adapters import load_app
from z4j_bare.cli.systemd import Notifier
from z4j_bare.concurrency import detect
from z4j_bare.concurrency.detect import patch
from z4j_bare.errors import HostConfigurationError


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "--app MODULE:ATTR is required"),
        ("shop", "not of the form"),
        ("no_such_module_at_all:app", "cannot load"),
        ("json:no_such_attribute", "cannot load"),
        (":app", "cannot load"),
        ("json:", "cannot load"),
        ("json.no_such", "of the form module:attr?"),
        ("os:path", "is a module: add the name of the object in it"),
        (3, "is 3, not of the form"),
    ],
)
def test_invalid_app_is_configuration_error(path, message):
    """An application that cannot be loaded is an error that names the flag and the cause."""
    with pytest.raises(HostConfigurationError, match="--app") as caught:
        load_app(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["json:dumps", "json.dumps"])
def test_both_forms_of_app_are_accepted(path):
    """``module:attr`` and ``module.attr`` name the same object."""
    assert load_app(path) is json.dumps


def test_app_that_raises_at_import_is_configuration_error(tmp_path, monkeypatch):
    """An exception of the application's module becomes an error that names the setting."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing_app.py").write_text("import os\napp = os.environ['FAILING_DATABASE']\n")
    with pytest.raises(
        HostConfigurationError,
        match=r"the app of celery 'failing_app:app'.*KeyError: 'FAILING_DATABASE'",
    ):
        adapters.build(adapters.ENGINES, {"celery": {"app": "failing_app:app"}}, None)


INSTALLING_APP = """\
from z4j_bare import AgentRuntime, BareFrameworkAdapter, install_agent

class Engine:
    name = "stub"

    def capabilities(self):
        return set()

runtime = install_agent(engines=[Engine()])
config = runtime.config
own = AgentRuntime(config=config, framework=BareFrameworkAdapter(config), engines=[Engine()])
own.start()
"""


def test_agent_of_imported_app_does_not_start(tmp_path, monkeypatch):
    """An application that installs an agent is imported without starting that agent.

    If it started, ``run`` could not start its own agent, and ``doctor`` would open a session.
    """
    set_connection(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "agent_app.py").write_text(INSTALLING_APP)
    runtime = load_app("agent_app:runtime")
    module = sys.modules["agent_app"]
    assert (runtime.state, module.own.state) == (RuntimeState.STOPPED, RuntimeState.STOPPED)
    assert singleton.current_runtime() is None
    runtime.start()  # after the import it can be started
    try:
        assert runtime.state is RuntimeState.RUNNING
    finally:
        runtime.stop(timeout=2)


def test_missing_setting_of_imported_app_is_named(tmp_path, monkeypatch):
    """A ConfigError of the application's own install_agent is passed on unchanged."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lacking_app.py").write_text(INSTALLING_APP)
    with pytest.raises(HostConfigurationError, match=r"^missing required Z4J settings: brain_url"):
        load_app("lacking_app:runtime")


def test_configuration_error_is_one_line(capsys, tmp_path, monkeypatch):
    """A missing setting is reported as one line on stderr with exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain_app.py").write_text(
        "from celery import Celery\napp = Celery('x', broker='memory://')\n"
    )
    assert main(["run", "--app", "plain_app:app"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("z4j-bare: ")
    assert "brain_url" in text
    assert "Traceback" not in text


# -- settings


def apply_settings(monkeypatch, text, *words, mode=0o600, tmp_path=None, **environment):
    """Apply a file, variables and flags; return what ``configuration.apply`` returns."""
    path = tmp_path / "agent.toml"
    path.write_text(text)
    path.chmod(mode)
    for name, value in environment.items():
        monkeypatch.setenv(f"Z4J_{name}", value)
    from z4j_bare.cli.main import build_parser

    arguments = build_parser("z4j-bare", ["run"]).parse_args(["run", "--config", str(path), *words])
    return configuration.apply(arguments)


SETTINGS = """\
brain_url = "http://file"
project_id = "file"
agent_name = "file"
environment = "file"
flush_events = 7
heartbeat = false
tags = {zone = "a", rack = 1}
redaction_extra_key_patterns = ["x", "y"]
"""


def test_flag_overrides_variable_overrides_file(monkeypatch, tmp_path):
    """A flag overrides a variable, a variable overrides the file; an empty variable is ignored."""
    apply_settings(
        monkeypatch,
        SETTINGS,
        "--brain-url",
        "http://flag",
        tmp_path=tmp_path,
        BRAIN_URL="http://variable",
        PROJECT_ID="variable",
        ENVIRONMENT="",
    )
    found = {
        name: os.environ[f"Z4J_{name}"]
        for name in ("BRAIN_URL", "PROJECT_ID", "AGENT_NAME", "ENVIRONMENT", "FLUSH_EVENTS")
    }
    assert found == {
        "BRAIN_URL": "http://flag",
        "PROJECT_ID": "variable",
        "AGENT_NAME": "file",
        "ENVIRONMENT": "file",
        "FLUSH_EVENTS": "7",
    }
    assert os.environ["Z4J_HEARTBEAT"] == "false"
    assert os.environ["Z4J_TAGS"] == "zone=a,rack=1"
    assert os.environ["Z4J_REDACTION_EXTRA_KEY_PATTERNS"] == "x,y"


def test_file_has_tables_of_engines_and_schedulers(monkeypatch, tmp_path):
    """The tables of the file and ``dev_mode`` are returned instead of copied to the environment."""
    text = 'dev_mode = true\n[engines.celery]\napp = "a:b"\n[schedulers.celery-beat]\n'
    found = apply_settings(monkeypatch, text, tmp_path=tmp_path)
    assert (found.dev_mode, found.engines, found.schedulers) == (
        True,
        {"celery": {"app": "a:b"}},
        {"celery-beat": {}},
    )


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("brain_ulr = 1", 0o600, "did you mean brain_url"),
        ("zzz = 1", 0o600, "unknown setting 'zzz'"),
        ("brain_url = ", 0o600, "is not TOML"),
        ("token = 'x'", 0o644, "chmod 600"),
        ("engines = ['celery']", 0o600, "must be tables"),
        ("brain_url = {a = 1}", 0o600, "must be a single value"),
        ("dev_mode = 'yes'", 0o600, "true or false"),
    ],
)
def test_invalid_file_is_configuration_error(monkeypatch, tmp_path, text, mode, message):
    """An invalid file is an error that names the file and the fix."""
    with pytest.raises(HostConfigurationError, match=r"agent\.toml") as caught:
        apply_settings(monkeypatch, text, mode=mode, tmp_path=tmp_path)
    assert message in str(caught.value)


def test_missing_file_is_configuration_error(capsys):
    """A missing file is reported as one line with exit code 2."""
    assert main(["run", "--config", "/no/such.toml"]) == 2
    assert "cannot read --config /no/such.toml" in capsys.readouterr().err


# -- engines and schedulers


@pytest.fixture
def fake_packages(monkeypatch):
    """Replace every adapter's package by one whose class records its constructor arguments."""

    class Adapter:
        def __init__(self, **arguments):
            self.arguments = arguments

    for spec in {*adapters.ENGINES.values(), *adapters.SCHEDULERS.values()}:
        module = SimpleNamespace(**{spec.attribute: Adapter})
        monkeypatch.setitem(sys.modules, spec.package.replace("-", "_"), module)


def test_adapters_get_app_and_options(fake_packages):
    """Each adapter gets the application as its own parameter, and the options of the file."""
    made = adapters.build(
        adapters.ENGINES,
        {name: {"extra": 1} for name in ("celery", "rq", "dramatiq", "huey", "taskiq")},
        "json:dumps",
    )
    assert [each.arguments for each in made] == [
        {name: json.dumps, "extra": 1}
        for name in ("celery_app", "rq_app", "broker", "huey", "broker")
    ]
    names = ("celerybeat", "apscheduler", "rqscheduler", "hueyperiodic", "taskiqscheduler")
    made = adapters.build(
        adapters.SCHEDULERS, {name: {"app": "json:loads"} for name in names}, "json:dumps"
    )
    assert [each.arguments for each in made] == [
        {name: json.loads} for name in ("celery_app", "scheduler", "scheduler", "huey", "source")
    ]


def test_arq_adapter_reads_worker_settings(fake_packages, monkeypatch):
    """Arq's adapters read ``WorkerSettings``; the engine also accepts plain redis settings."""

    def job():
        """A job."""

    settings = SimpleNamespace(
        functions=[job, SimpleNamespace(name="other")],
        redis_settings="redis",
        queue_name="q",
        cron_jobs=[1],
    )
    monkeypatch.setitem(
        sys.modules, "arq_app", SimpleNamespace(WorkerSettings=settings, redis="plain")
    )
    (full,) = adapters.build(adapters.ENGINES, {"arq": {}}, "arq_app:WorkerSettings")
    assert full.arguments == {
        "redis_settings": "redis",
        "function_names": ["job", "other"],
        "queue_name": "q",
    }
    (plain,) = adapters.build(adapters.ENGINES, {"arq": {}}, "arq_app:redis")
    assert plain.arguments == {"redis_settings": "plain"}
    (cron,) = adapters.build(adapters.SCHEDULERS, {"arq-cron": {}}, "arq_app:WorkerSettings")
    assert cron.arguments == {"cron_jobs": [1]}


def test_adapter_that_cannot_be_built_is_configuration_error(monkeypatch):
    """A missing package, an unknown name and a constructor's exception are reported."""
    monkeypatch.setitem(sys.modules, "z4j_rq", None)
    with pytest.raises(HostConfigurationError, match="pip install z4j-rq"):
        adapters.build(adapters.ENGINES, {"rq": {}}, "json:dumps")
    with pytest.raises(
        HostConfigurationError, match="unknown adapter 'cellery': choose from celery, rq"
    ):
        adapters.build(adapters.ENGINES, {"cellery": {}}, "json:dumps")
    with pytest.raises(
        HostConfigurationError, match="cannot create CeleryEngineAdapter from json:dumps"
    ):
        adapters.build(adapters.ENGINES, {"celery": {"no_such": 1}}, "json:dumps")


@pytest.mark.parametrize(
    ("flags", "variable", "found"),
    [
        (None, "", {"celery": {"app": "file:app", "deep": 1}, "rq": {}}),
        (None, "celery=variable:app", {"celery": {"app": "variable:app", "deep": 1}}),
        (None, "celery, z4j-huey", {"celery": {"app": "file:app", "deep": 1}, "huey": {}}),
        ([("celery", "flag:app")], "rq", {"celery": {"app": "flag:app", "deep": 1}}),
    ],
)
def test_flags_select_engines_before_variable_and_file(monkeypatch, flags, variable, found):
    """Flags select the engines, else the variable, else the file; options come from the file."""
    monkeypatch.setenv("Z4J_ENGINES", variable)
    tables = {"celery": {"app": "file:app", "deep": 1}, "rq": {}}
    assert run_command.select_adapters(flags, "Z4J_ENGINES", tables) == found


# -- the process


@pytest.mark.parametrize("seconds", ["-1", "nan", "7200"])
def test_invalid_drain_is_configuration_error(seconds, capsys):
    """A drain outside its range is an error that names the flag."""
    assert main(["run", "--app", "json:dumps", "--drain", seconds]) == 2
    assert "--drain" in capsys.readouterr().err


def test_patch_accepts_present_mode_and_rejects_unknown(mode):
    """Patching twice and ``auto`` change nothing; an unknown name is an error."""
    patch(mode)
    patch("auto")
    assert detect().outcome == ("none" if mode == "threads" else mode)
    with pytest.raises(HostConfigurationError, match="Z4J_CONCURRENCY"):
        patch("fibers")


def test_json_log_line_has_all_fields():
    """A JSON line has time, level, logger, message, exception; unknown levels and formats raise."""
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.LogRecord(
            "z4j.x", logging.WARNING, "f", 1, "so %s\nmuch", ("é",), sys.exc_info()
        )
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["logger"]) == ("WARNING", "z4j.x")
    assert found["message"] == "so é\nmuch"
    assert "ValueError: boom" in found["exception"]
    assert found["ts"].endswith("+00:00")
    for words in (("LOUD",), ("INFO", "xml")):
        with pytest.raises(HostConfigurationError, match="Z4J_LOG"):
            logs.configure(*words)


@pytest.fixture
def systemd(monkeypatch, tmp_path):
    """A notification socket; ``systemd()`` returns the notifications since the last call."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.setblocking(False)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

    def received():
        notifications = []
        while True:
            try:
                notifications.append(listener.recv(4096).decode())
            except BlockingIOError:
                return notifications

    yield received
    listener.close()


def test_notifier_sends_changes_and_watchdog(systemd, monkeypatch):
    """The status is sent on change and the watchdog once per third of its interval.

    Without a listening socket nothing is sent and nothing raises.
    """
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    notifier = Notifier()
    notifier.ready()
    for _ in range(3):
        notifier.alive()
        notifier.status("well")
    notifier.stopping()
    assert systemd() == ["READY=1", "WATCHDOG=1", "STATUS=well", "STOPPING=1"]
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    Notifier().alive()
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    Notifier().alive()
    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody-listens-here")
    Notifier().ready()
    monkeypatch.delenv("NOTIFY_SOCKET")
    Notifier().ready()
    assert systemd() == []


RUN_SCRIPT = """
import sys
from tests.launch import patch
patch(sys.argv[1])
from types import SimpleNamespace
from tests.support.engines import FakeEngine
from z4j_bare.cli import adapters, main
adapters.ENGINES["celery"] = SimpleNamespace(build=lambda *_arguments: FakeEngine())
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def standalone(backend, tmp_path):
    """``standalone(*words, mode=...)``: start ``z4j-bare run`` connected to ``standalone.peer``."""
    peer, token, key = Peer(backend), tmp_path / "token", tmp_path / "key"
    token.write_text(TOKEN)
    key.write_text(SECRET_TEXT)
    settings = {
        "brain_url": peer.url,
        "project_id": "p",
        "token_file": token,
        "hmac_secret_file": key,
        "log_format": "json",
    }
    lines = [f'{name} = "{value}"\n' for name, value in settings.items()]
    (tmp_path / "agent.toml").write_text("".join(lines))
    started = []

    def start(*words, mode="threads", script=RUN_SCRIPT):
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            script,
            mode,
            "run",
            "--config",
            str(tmp_path / "agent.toml"),
            *words,
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    start.peer = peer
    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()
    peer.stop()


def test_standalone_agent_handles_its_signals(mode, until, standalone, systemd):
    """The agent connects, notifies systemd, refuses a second instance, and handles its signals.

    SIGHUP makes it reconnect, SIGTERM makes it close the session with a goodbye and exit with 0.
    """
    process, peer = standalone(mode=mode), standalone.peer
    until(lambda: peer.frames("heartbeat"), seconds=40)
    notifications = []
    until(
        lambda: (
            notifications.extend(systemd())
            or any(line.startswith("STATUS=connected over ws") for line in notifications)
        )
    )
    second = standalone(mode=mode)
    until(lambda: second.poll() is not None)
    assert second.returncode == run_command.ALREADY_RUNNING
    text = second.stderr.read()
    assert f"pid {process.pid}" in text
    assert "--allow-second" in text
    process.send_signal(signal.SIGHUP)
    until(lambda: len(peer.sessions) == 2 and peer.sessions[1].hello)
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None)
    text = process.stderr.read()
    assert process.returncode == 0, text
    assert peer.sessions[1].close_code == 1000
    lines = [json.loads(line) for line in text.splitlines()]
    assert any("connected over ws" in line["message"] for line in lines)
    assert TOKEN not in text
    assert (notifications[0], systemd()[-1]) == ("READY=1", "STOPPING=1")


#: ``RUN_SCRIPT`` with a flush loop that blocks its thread while the file ``jam`` exists.
BLOCKING_SCRIPT = RUN_SCRIPT.replace(
    "sys.exit(main",
    """
import ctypes, os
from pathlib import Path
from z4j_bare.cli import run
from z4j_bare.pipeline.flush import FlushLoop
jam, seen = Path(os.environ["Z4J_HOME"], "jam"), Path(os.environ["Z4J_HOME"], "seen")
def blocking_run(self, stop_event):
    while not stop_event.is_set():
        while jam.exists():
            seen.touch()
            ctypes.CDLL(None).usleep(10_000)
        self._backend.sleep(0.02)
FlushLoop.run = blocking_run
run.STUCK_SECONDS = 0.5
sys.exit(main""",
)


def test_watchdog_is_not_reset_while_loop_is_stuck(
    mode, until, standalone, systemd, monkeypatch, tmp_path
):
    """While a loop of the agent is stuck, the watchdog is not reset and the status names the loop.

    Under gevent and eventlet the whole hub is blocked, so that no status can be sent.
    """
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    jam, seen = tmp_path / "home" / "jam", tmp_path / "home" / "seen"
    process = standalone(mode=mode, script=BLOCKING_SCRIPT)
    until(lambda: "WATCHDOG=1" in systemd(), seconds=40)
    jam.touch()
    until(seen.exists)
    if mode == "threads":
        until(lambda: "STATUS=stuck: z4j-flush" in systemd())
    else:
        systemd()
    time.sleep(3 * run_command.POLL_INTERVAL)
    assert "WATCHDOG=1" not in systemd()
    jam.unlink()
    until(lambda: "WATCHDOG=1" in systemd())
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None)
    assert process.returncode == 0


def test_allow_second_and_concurrency_flags(mode, until, standalone):
    """``--allow-second`` allows a second agent, ``--concurrency`` patches it, SIGINT stops it."""
    first = standalone()
    until(lambda: len(standalone.peer.live) == 1, seconds=40)
    second = standalone("--allow-second", "--concurrency", mode)
    until(lambda: len(standalone.peer.live) == 2, seconds=40)
    until(lambda: len(standalone.peer.frames("heartbeat")) >= 2)
    found = {
        frame.payload.adapter_health["z4j.concurrency"]
        for frame in standalone.peer.frames("heartbeat")
    }
    assert found == {"threads", mode}
    assert first.poll() is None
    second.send_signal(signal.SIGINT)
    until(lambda: second.poll() is not None)
    assert second.returncode == 0
