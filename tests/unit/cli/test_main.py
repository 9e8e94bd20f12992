"""The command line: exit codes, messages, and an agent that runs until it is told to stop."""

import json
import subprocess
import sys
import time

import pytest
from z4j_core.version import PROTOCOL_VERSION

from tests.support.front import Front
from tests.support.peer import SECRET_TEXT, TOKEN
from z4j_bare.cli import main


def test_without_a_command(capsys):
    """No command prints the help and is a usage error."""
    assert main([]) == 2
    assert "run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["run", "--no-such-option"],
        ["--log-level", "LOUD", "version"],
        ["run", "--engine", "none"],
    ],
)
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
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"] == PROTOCOL_VERSION
    assert f"protocol {PROTOCOL_VERSION}" in lines


def test_help_of_every_command(capsys):
    """Every command explains itself, and naming one loads its module."""
    from z4j_bare.cli.main import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
    assert "--token-file" in capsys.readouterr().out


def test_as_a_module():
    """``python -m z4j_bare`` is the same command."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "z4j_bare", "version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "protocol" in done.stdout
    assert time.monotonic() - began < 60


@pytest.fixture
def spoken_to(monkeypatch):
    """``spoken_to(url)``: the environment of an agent of that brain."""

    def point(url):
        for name, value in {
            "BRAIN_URL": url,
            "PROJECT_ID": "p",
            "TOKEN": TOKEN,
            "HMAC_SECRET": SECRET_TEXT,
        }.items():
            monkeypatch.setenv(f"Z4J_{name}", value)

    return point


def test_doctor_and_check(backend, spoken_to, capsys):
    """Both say what they found, for people line by line and for machines as one object; the exit code says it too."""
    front = Front(backend)
    spoken_to(front.url)
    try:
        assert main(["doctor"]) == 0
        said = capsys.readouterr().out
        assert "all is well" in said
        assert "\x1b" not in said
        assert main(["check", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert [probe["name"] for probe in answer["probes"]] == [
            "buffer_path",
            "dns",
            "tcp",
            "tls",
            "http",
        ]
        assert front.ws.token not in str(answer)
        front.http.token = "another"
        assert main(["doctor"]) == 1
        said = capsys.readouterr().out
        assert "FAIL  token" in said
        assert "-> copy Z4J_TOKEN" in said
        assert "1 of 13 failed: token" in said
    finally:
        front.stop()


STUB = """\
class Engine:
    name = "stub"

    def capabilities(self):
        return set()

runtime = install_agent(engines=[Engine()])
"""


def test_doctor_with_an_app_and_a_file(backend, capsys, monkeypatch, tmp_path):
    """The application that the doctor imports finds the settings of --config, and nobody says hello."""
    front = Front(backend)
    names = ("brain_url", "project_id", "token", "hmac_secret")
    for name in names:
        monkeypatch.setenv(
            f"Z4J_{name.upper()}", ""
        )  # restored at the end, whatever the command puts there
    file = tmp_path / "agent.toml"
    values = zip(names, (front.url, "p", TOKEN, SECRET_TEXT), strict=True)
    file.write_text("".join(f'{name} = "{value}"\n' for name, value in values))
    file.chmod(0o600)
    (tmp_path / "doctored_app.py").write_text("from z4j_bare import install_agent\n" + STUB)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert main(["doctor", "--config", str(file), "--app", "doctored_app:runtime"]) == 0
        assert "all is well" in capsys.readouterr().out
        assert [each for each in front.ws.sessions if each.hello] == []
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


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["z4j-bare", "do"], {"doctor"}),
        (["z4j-bare", "status", "--wa"], {"--watch"}),
        (["z4j-bare", "buffer", "fl"], {"flush"}),
        (["z4j-bare", "buffer", "drop", "--y"], {"--yes"}),
        (["z4j-bare", "run", "--concurrency", "g"], {"gevent"}),
        (
            ["z4j-bare", "--log-level", "DEBUG", "completion", ""],
            {"bash", "zsh", "fish", "-h", "--help"},
        ),
    ],
)
def test_completion_in_bash(capsys, typed, offered):
    """Bash completes commands, their options and the values of those, as the parsers have them."""
    assert main(["completion", "bash"]) == 0
    words = " ".join(f"'{word}'" for word in typed)
    script = (
        capsys.readouterr().out
        + f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _z4j_bare; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    assert set(done.stdout.split()) == offered


def test_completion_elsewhere(capsys):
    """Zsh takes bash's script, fish has lines of its own for every command and option."""
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(
        line.startswith("complete -c z4j-bare ") and line.count("'") % 2 == 0 for line in lines
    )
    assert any(
        "__fish_seen_subcommand_from buffer" in line and "-a flush" in line for line in lines
    )
    assert any("-l watch" in line for line in lines)
