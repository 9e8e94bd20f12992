"""The standalone agent: its settings by their weight, what it looks after, signals, systemd, logs and exit codes."""

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

from tests.support.peer import SECRET_TEXT, TOKEN, Peer
from z4j_bare import RuntimeState
from z4j_bare import _process_singleton as singleton
from z4j_bare.cli import adapters, configuration, logs, main
from z4j_bare.cli import run as run_command
from z4j_bare.cli.apps import load_app
from z4j_bare.cli.systemd import Notifier
from z4j_bare.concurrency import detect
from z4j_bare.concurrency.detect import patch
from z4j_bare.errors import HostConfigurationError


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (None, "--app MODULE:ATTR is required"),
        ("shop", "not of the form"),
        ("no_such_module_at_all:app", "cannot be loaded"),
        ("json:no_such_attribute", "cannot be loaded"),
        (":app", "cannot be loaded"),
        ("json:", "cannot be loaded"),
        ("json.no_such", "of the form module:attr?"),
        ("os:path", "is a module: name the object in it"),
        (3, "is 3, not of the form"),
    ],
)
def test_bad_apps(path, said):
    """An application that cannot be loaded is one line that says what is wrong with it."""
    with pytest.raises(HostConfigurationError, match="--app") as caught:
        load_app(path)
    assert said in str(caught.value)


@pytest.mark.parametrize("path", ["json:dumps", "json.dumps"])
def test_good_apps(path):
    """Both usual spellings of an application are understood."""
    assert load_app(path) is json.dumps


def test_an_application_that_fails_at_import(tmp_path, monkeypatch):
    """What the application itself lacks is one line, too, which names where the application was named."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needy_app.py").write_text("import os\napp = os.environ['NEEDY_DATABASE']\n")
    with pytest.raises(
        HostConfigurationError,
        match=r"the app of celery 'needy_app:app'.*KeyError: 'NEEDY_DATABASE'",
    ):
        adapters.build(adapters.ENGINES, {"celery": {"app": "needy_app:app"}}, None)


INSTALLS = """\
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


def test_the_agent_of_an_application_stays_out(tmp_path, monkeypatch):
    """An application that installs an agent, as ours does after the docs, is imported without its agent.

    It would take the process from `run`, whose engines and settings are others, and connect under `doctor`.
    """
    for name, value in {
        "BRAIN_URL": "http://127.0.0.1:9",
        "TOKEN": TOKEN,
        "PROJECT_ID": "p",
        "HMAC_SECRET": SECRET_TEXT,
    }.items():
        monkeypatch.setenv(f"Z4J_{name}", value)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "agent_app.py").write_text(INSTALLS)
    runtime = load_app("agent_app:runtime")
    module = sys.modules["agent_app"]
    assert (runtime.state, module.own.state) == (RuntimeState.STOPPED, RuntimeState.STOPPED)
    assert singleton.current_runtime() is None
    runtime.start()  # afterwards nothing holds it back
    try:
        assert runtime.state is RuntimeState.RUNNING
    finally:
        runtime.stop(timeout=2)


def test_what_the_agent_of_an_application_lacks(tmp_path, monkeypatch):
    """A setting that is missing to the application's own install_agent is told as that, not as an import that failed."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lacking_app.py").write_text(INSTALLS)
    with pytest.raises(HostConfigurationError, match=r"^missing required Z4J settings: brain_url"):
        load_app("lacking_app:runtime")


def test_configuration_errors_are_one_line(capsys, tmp_path, monkeypatch):
    """A missing setting is one line on stderr and exit code 2, without a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lonely_app.py").write_text(
        "from celery import Celery\napp = Celery('x', broker='memory://')\n"
    )
    assert main(["run", "--app", "lonely_app:app"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("z4j-bare: ")
    assert "brain_url" in said
    assert "Traceback" not in said


# -- settings


def applied(monkeypatch, text, *words, mode=0o600, tmp_path=None, **environment):
    """The environment after file, variables and flags."""
    path = tmp_path / "agent.toml"
    path.write_text(text)
    path.chmod(mode)
    for name, value in environment.items():
        monkeypatch.setenv(f"Z4J_{name}", value)
    from z4j_bare.cli.main import build_parser

    arguments = build_parser("z4j-bare", ["run"]).parse_args(["run", "--config", str(path), *words])
    return configuration.apply(arguments)


def test_weights(monkeypatch, tmp_path):
    """A setting of the file is outweighed by the environment, and that by a flag; a variable that is empty says nothing."""
    text = 'brain_url = "http://file"\nproject_id = "file"\nagent_name = "file"\nenvironment = "file"\nflush_events = 7\n'
    text += 'heartbeat = false\ntags = {zone = "a", rack = 1}\nredaction_extra_key_patterns = ["x", "y"]\n'
    applied(
        monkeypatch, text, "--brain-url", "http://flag", tmp_path=tmp_path,
        BRAIN_URL="http://variable", PROJECT_ID="variable", ENVIRONMENT="",
    )  # fmt: skip
    found = {
        name: os.environ[f"Z4J_{name}"]
        for name in ("BRAIN_URL", "PROJECT_ID", "AGENT_NAME", "ENVIRONMENT", "FLUSH_EVENTS")
    }
    assert found == {
        "BRAIN_URL": "http://flag", "PROJECT_ID": "variable", "AGENT_NAME": "file", "ENVIRONMENT": "file", "FLUSH_EVENTS": "7",
    }  # fmt: skip
    assert os.environ["Z4J_HEARTBEAT"] == "false"
    assert os.environ["Z4J_TAGS"] == "zone=a,rack=1"
    assert os.environ["Z4J_REDACTION_EXTRA_KEY_PATTERNS"] == "x,y"


def test_tables(monkeypatch, tmp_path):
    """Engines and schedulers of the file are tables, and dev_mode is its own."""
    text = 'dev_mode = true\n[engines.celery]\napp = "a:b"\n[schedulers.celery-beat]\n'
    found = applied(monkeypatch, text, tmp_path=tmp_path)
    assert (found.dev_mode, found.engines, found.schedulers) == (
        True,
        {"celery": {"app": "a:b"}},
        {"celery-beat": {}},
    )


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("brain_ulr = 1", 0o600, "did you mean brain_url"),
        ("zzz = 1", 0o600, "there is no setting 'zzz'"),
        ("brain_url = ", 0o600, "is not TOML"),
        ("token = 'x'", 0o644, "chmod 600"),
        ("engines = ['celery']", 0o600, "are tables"),
        ("brain_url = {a = 1}", 0o600, "takes one value"),
        ("dev_mode = 'yes'", 0o600, "true or false"),
    ],
)
def test_bad_files(monkeypatch, tmp_path, text, mode, said):
    """What is wrong with a file is told with its name, and the way out."""
    with pytest.raises(HostConfigurationError, match=r"agent\.toml") as caught:
        applied(monkeypatch, text, mode=mode, tmp_path=tmp_path)
    assert said in str(caught.value)


def test_a_missing_file(capsys):
    """A file that is not there is one line and exit code 2."""
    assert main(["run", "--config", "/no/such.toml"]) == 2
    assert "/no/such.toml cannot be read" in capsys.readouterr().err


# -- engines and schedulers


@pytest.fixture
def stand_ins(monkeypatch):
    """Adapters' packages that are not installed, as their constructors are."""

    class Adapter:
        def __init__(self, **arguments):
            self.arguments = arguments

    for kind in {*adapters.ENGINES.values(), *adapters.SCHEDULERS.values()}:
        module = SimpleNamespace(**{kind.attribute: Adapter})
        monkeypatch.setitem(sys.modules, kind.package.replace("-", "_"), module)


def test_every_adapter(stand_ins):
    """Each gets the application under the name that its constructor wants, and options of the file besides."""
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


def test_arq(stand_ins, monkeypatch):
    """Arq's worker settings are read; redis settings alone will do."""

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


def test_adapters_that_cannot_be_made(monkeypatch):
    """An adapter that is not installed names the package, one that refuses says why."""
    monkeypatch.setitem(sys.modules, "z4j_rq", None)
    with pytest.raises(HostConfigurationError, match="pip install z4j-rq"):
        adapters.build(adapters.ENGINES, {"rq": {}}, "json:dumps")
    with pytest.raises(HostConfigurationError, match="none of celery, rq"):
        adapters.build(adapters.ENGINES, {"cellery": {}}, "json:dumps")
    with pytest.raises(
        HostConfigurationError, match="CeleryEngineAdapter cannot be made of json:dumps"
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
def test_which_engines(monkeypatch, flags, variable, found):
    """Flags say which, else the variable, else the file; what the file says of one of them holds."""
    monkeypatch.setenv("Z4J_ENGINES", variable)
    tables = {"celery": {"app": "file:app", "deep": 1}, "rq": {}}
    assert run_command.wanted(flags, "Z4J_ENGINES", tables) == found


# -- the process


@pytest.mark.parametrize("seconds", ["-1", "nan", "7200"])
def test_bad_drains(seconds, capsys):
    """A drain that makes no sense names its setting."""
    assert main(["run", "--app", "json:dumps", "--drain", seconds]) == 2
    assert "--drain" in capsys.readouterr().err


def test_patching_on_request(mode):
    """What is patched already stays so, nothing is patched unasked, and unknown names are refused."""
    patch(mode)
    patch("auto")
    assert detect().outcome == ("none" if mode == "threads" else mode)
    with pytest.raises(HostConfigurationError, match="Z4J_CONCURRENCY"):
        patch("fibers")


def test_log_lines():
    """A JSON line holds time, level, logger, message and exception; bad levels and forms are refused."""
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.LogRecord(
            "z4j.x", logging.WARNING, "f", 1, "so %s\nmuch", ("é",), sys.exc_info()
        )
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["logger"], found["message"]) == ("WARNING", "z4j.x", "so é\nmuch")
    assert "ValueError: boom" in found["exception"]
    assert found["ts"].endswith("+00:00")
    for words in (("LOUD",), ("INFO", "xml")):
        with pytest.raises(HostConfigurationError, match="Z4J_LOG"):
            logs.configure(*words)


@pytest.fixture
def systemd(monkeypatch, tmp_path):
    """A listening systemd; ``systemd()`` returns what it has heard."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    door.bind(str(tmp_path / "notify"))
    door.setblocking(False)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

    def heard():
        said = []
        while True:
            try:
                said.append(door.recv(4096).decode())
            except BlockingIOError:
                return said

    yield heard
    door.close()


def test_systemd_is_told(systemd, monkeypatch):
    """Ready, status once a change, the watchdog at a third of its time, stopping; nothing without anybody to hear."""
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    notifier = Notifier()
    notifier.ready()
    for _ in range(3):
        notifier.alive()
        notifier.status("well")
    notifier.stop_event()
    assert systemd() == ["READY=1", "WATCHDOG=1", "STATUS=well", "STOPPING=1"]
    monkeypatch.setenv("WATCHDOG_PID", "1")
    Notifier().alive()
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    Notifier().alive()
    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody-listens-here")
    Notifier().ready()
    monkeypatch.delenv("NOTIFY_SOCKET")
    Notifier().ready()
    assert systemd() == []


RUN = """
import sys
from tests.launch import patch
patch(sys.argv[1])
from types import SimpleNamespace
from z4j_bare.cli import adapters, main
class Engine:
    name = "stub"
    def capabilities(self):
        return set()
adapters.ENGINES["celery"] = SimpleNamespace(build=lambda *_given: Engine())
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def standalone(backend, tmp_path):
    """``standalone(*words, mode=...)``: start an agent in a process of its own that talks to a ``Peer``."""
    peer, token, key = Peer(backend), tmp_path / "token", tmp_path / "key"
    token.write_text(TOKEN)
    key.write_text(SECRET_TEXT)
    (tmp_path / "agent.toml").write_text(
        f'brain_url = "{peer.url}"\nproject_id = "p"\ntoken_file = "{token}"\nhmac_secret_file = "{key}"\nlog_format = "json"\n'
    )
    started = []

    def start(*words, mode="threads", script=RUN):
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


def test_a_whole_life(mode, until, standalone, systemd):
    """It connects, tells systemd, connects anew on SIGHUP, lets no second one in, and ends with a goodbye on SIGTERM."""
    process, peer = standalone(mode=mode), standalone.peer
    until(lambda: peer.frames("heartbeat"), seconds=40)
    told = []
    until(
        lambda: (
            told.extend(systemd())
            or any(line.startswith("STATUS=connected over ws") for line in told)
        )
    )
    second = standalone(mode=mode)
    until(lambda: second.poll() is not None)
    assert second.returncode == run_command.REFUSED
    said = second.stderr.read()
    assert f"pid {process.pid}" in said
    assert "--allow-second" in said
    process.send_signal(signal.SIGHUP)
    until(lambda: len(peer.sessions) == 2 and peer.sessions[1].hello)
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None)
    said = process.stderr.read()
    assert process.returncode == 0, said
    assert peer.sessions[1].goodbye == 1000
    lines = [json.loads(line) for line in said.splitlines()]
    assert any("connected over ws" in line["message"] for line in lines)
    assert TOKEN not in said
    assert (told[0], systemd()[-1]) == ("READY=1", "STOPPING=1")


#: An agent whose flush loop computes, or hangs in foreign code, for as long as there is a file.
JAMMED = RUN.replace(
    "sys.exit(main",
    """
import ctypes, os
from pathlib import Path
from z4j_bare.cli import run
from z4j_bare.pipeline.flush import FlushLoop
jam, seen = Path(os.environ["Z4J_HOME"], "jam"), Path(os.environ["Z4J_HOME"], "seen")
def jammed(self, stopping):
    while not stopping.is_set():
        while jam.exists():
            seen.touch()
            ctypes.CDLL(None).usleep(10_000)
        self._backend.sleep(0.02)
FlushLoop.run = jammed
run.STUCK = 0.5
sys.exit(main""",
)


def test_a_stuck_loop_starves_the_watchdog(mode, until, standalone, systemd, monkeypatch, tmp_path):
    """While a loop of the agent does not go on, systemd's watchdog is not fed; where another thread can, it tells why."""
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    jam, seen = tmp_path / "home" / "jam", tmp_path / "home" / "seen"
    process = standalone(mode=mode, script=JAMMED)
    until(lambda: "WATCHDOG=1" in systemd(), seconds=40)
    jam.touch()
    until(seen.exists)
    if mode == "threads":  # else the hub is stuck as a whole
        until(lambda: "STATUS=stuck: z4j-flush" in systemd())
    else:
        systemd()
    time.sleep(3 * run_command.POLL)  # three more looks
    assert "WATCHDOG=1" not in systemd()
    jam.unlink()
    until(lambda: "WATCHDOG=1" in systemd())
    process.send_signal(signal.SIGTERM)
    until(lambda: process.poll() is not None)
    assert process.returncode == 0


def test_two_by_wish_and_patched_by_flag(mode, until, standalone):
    """``--allow-second`` lets another one in; ``--concurrency`` patches a process that was not; SIGINT ends it too."""
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
