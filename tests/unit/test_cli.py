"""The command line: exit codes, messages, and an agent that runs until it is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from z4j_core.version import PROTOCOL_VERSION

from tests.front import Front
from tests.peer import SECRET_TEXT, TOKEN, Peer
from z4j_bare.cli import main
from z4j_bare.cli.apps import load_app
from z4j_bare.errors import HostConfigurationError


def test_without_a_command(capsys):
    """No command prints the help and is a usage error."""
    assert main([]) == 2
    assert "run" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nonsense"], ["run", "--no-such-option"], ["--log-level", "LOUD", "version"], ["run", "--engine", "none"]])
def test_usage_errors(argv, capsys):
    """What argparse refuses ends with code 2 and says why on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_version(capsys):
    """The versions that matter are printed, one a line, and it needs no setting."""
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("z4j-bare 1.13") for line in lines)
    assert f"protocol {PROTOCOL_VERSION}" in lines


def test_help_of_every_command(capsys):
    """Every command explains itself, and naming one loads its module."""
    from z4j_bare.cli.main import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
    assert "--token-file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (None, "--app MODULE:ATTR is required"),
        ("shop", "not of the form"),
        ("no_such_module_at_all:app", "cannot be loaded"),
        ("json:no_such_attribute", "cannot be loaded"),
        (":app", "cannot be loaded"),
        ("json:", "cannot be loaded"),
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
    import json

    assert load_app(path) is json.dumps


def test_configuration_errors_are_one_line(capsys, tmp_path, monkeypatch):
    """A missing setting is one line on stderr and exit code 2, without a traceback; a bad path variable likewise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lonely_app.py").write_text("from celery import Celery\napp = Celery('x', broker='memory://')\n")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert main(["run", "--app", "lonely_app:app"]) == 2
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    said = capsys.readouterr().err
    assert said.startswith("z4j-bare: ")
    assert "brain_url" in said
    assert "Traceback" not in said


RUN = """
import sys
from tests.launch import patch
patch(sys.argv[1])
from z4j_bare.cli import main, run
class Engine:
    name = "stub"
    def capabilities(self):
        return set()
run.ENGINES["celery"] = lambda _app: Engine()
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_until_it_is_told_to_stop(mode, seam, until, tmp_path, number):
    """``z4j-bare run`` gets a session, and ends cleanly with a goodbye on SIGINT and SIGTERM."""
    peer, token, key = Peer(seam), tmp_path / "token", tmp_path / "key"
    token.write_text(TOKEN)
    key.write_text(SECRET_TEXT)
    words = ["run", "--brain-url", peer.url, "--project-id", "p", "--token-file", str(token), "--hmac-secret-file", str(key)]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RUN, mode, *words], env={**os.environ, "Z4J_HOME": str(tmp_path / "home")}, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: peer.frames("heartbeat"), seconds=40)
        process.send_signal(number)
        until(lambda: process.poll() is not None, seconds=30)
        said = process.stderr.read()
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert TOKEN not in said
        assert peer.sessions[0].goodbye == 1000
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        peer.stop()


def test_as_a_module():
    """``python -m z4j_bare`` is the same command."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "z4j_bare", "version"], capture_output=True, text=True, timeout=60, check=True)
    assert "protocol" in done.stdout
    assert time.monotonic() - began < 60


@pytest.fixture
def spoken_to(monkeypatch):
    """``spoken_to(url)``: the environment of an agent of that brain."""

    def point(url):
        for name, value in {"BRAIN_URL": url, "PROJECT_ID": "p", "TOKEN": TOKEN, "HMAC_SECRET": SECRET_TEXT}.items():
            monkeypatch.setenv(f"Z4J_{name}", value)

    return point


def test_doctor_and_check(seam, spoken_to, capsys):
    """Both say what they found, for people line by line and for machines as one object; the exit code says it too."""
    front = Front(seam)
    spoken_to(front.url)
    try:
        assert main(["doctor"]) == 0
        said = capsys.readouterr().out
        assert "all is well" in said
        assert "\x1b" not in said
        assert main(["check", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert [probe["name"] for probe in answer["probes"]] == ["buffer_path", "dns", "tcp", "tls", "http"]
        assert front.ws.token not in str(answer)
        front.http.token = "another"
        assert main(["doctor"]) == 1
        said = capsys.readouterr().out
        assert "FAIL  token" in said
        assert "-> copy Z4J_TOKEN" in said
        assert "1 of 12 failed: token" in said
    finally:
        front.stop()


@pytest.mark.parametrize("command", ["doctor", "check"])
def test_settings_that_are_wrong(command, capsys, monkeypatch):
    """A missing setting and a path variable of old are one line each that names them, without a traceback."""
    assert main([command]) == 1
    assert "brain_url" in capsys.readouterr().out
    monkeypatch.setenv("Z4J_BUFFER_DIR", "/somewhere")
    assert main([command, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["stage"]) == (False, "config")
    assert "Z4J_BUFFER_DIR" in answer["error"]
    assert "Z4J_HOME" in answer["error"]
