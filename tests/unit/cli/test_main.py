"""The commands: usage errors, help, doctor, check, version and completion."""

import json
import subprocess
import sys
import time

import pytest
from z4j_core.version import PROTOCOL_VERSION

from tests.support.combined_peer import CombinedPeer
from tests.support.environment import set_connection
from tests.support.peer import SECRET_TEXT, TOKEN
from z4j_bare.cli import main


def test_missing_command_prints_help(capsys):
    """Without a command the help is printed and the exit code is 2."""
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
def test_invalid_arguments_are_usage_errors(argv, capsys):
    """An argument that argparse rejects ends with exit code 2 and a message on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_version_without_settings(capsys):
    """The installed versions are printed without any setting, one per line or as JSON."""
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("z4j-bare 1.13") for line in lines)
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"] == PROTOCOL_VERSION
    assert f"protocol {PROTOCOL_VERSION}" in lines


def test_every_command_has_help(capsys):
    """``COMMAND --help`` prints the command's options for every command."""
    from z4j_bare.cli.main import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
    assert "--token-file" in capsys.readouterr().out


def test_module_runs_the_command_line():
    """``python -m z4j_bare`` runs the same command line."""
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


def test_doctor_and_check_report_probes(backend, monkeypatch, capsys):
    """Both report every probe as text or JSON, and the exit code says whether one failed."""
    brain = CombinedPeer(backend)
    set_connection(monkeypatch, brain.url)
    try:
        assert main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert "no probe failed" in text
        assert "\x1b" not in text
        assert main(["check", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert [probe["name"] for probe in answer["probes"]] == [
            "buffer_path",
            "dns",
            "tcp",
            "tls",
            "http",
        ]
        assert brain.ws.token not in str(answer)
        brain.http.token = "another"
        assert main(["doctor"]) == 1
        text = capsys.readouterr().out
        assert "FAIL  token" in text
        assert "-> copy Z4J_TOKEN" in text
        assert "1 of 13 probes failed: token" in text
    finally:
        brain.stop()


APPLICATION = """\
class Engine:
    name = "stub"

    def capabilities(self):
        return set()

runtime = install_agent(engines=[Engine()])
"""


def test_doctor_imports_app_with_settings_of_file(backend, capsys, monkeypatch, tmp_path):
    """The application that the doctor imports gets the file's settings and starts no agent."""
    brain = CombinedPeer(backend)
    names = ("brain_url", "project_id", "token", "hmac_secret")
    for name in names:
        monkeypatch.setenv(f"Z4J_{name.upper()}", "")  # makes monkeypatch restore it at the end
    file = tmp_path / "agent.toml"
    values = zip(names, (brain.url, "p", TOKEN, SECRET_TEXT), strict=True)
    file.write_text("".join(f'{name} = "{value}"\n' for name, value in values))
    file.chmod(0o600)
    (tmp_path / "doctored_app.py").write_text("from z4j_bare import install_agent\n" + APPLICATION)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert main(["doctor", "--config", str(file), "--app", "doctored_app:runtime"]) == 0
        assert "no probe failed" in capsys.readouterr().out
        assert [each for each in brain.ws.sessions if each.hello] == []
    finally:
        brain.stop()


@pytest.mark.parametrize("command", ["doctor", "check"])
def test_wrong_settings_are_reported_by_name(command, capsys, monkeypatch):
    """A missing setting and a removed path variable are reported by name, without a traceback."""
    assert main([command]) == 1
    assert "brain_url" in capsys.readouterr().out
    monkeypatch.setenv("Z4J_BUFFER_DIR", "/somewhere")
    assert main([command, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["stage"]) == (False, "config")
    assert "Z4J_BUFFER_DIR" in answer["error"]
    assert "Z4J_HOME" in answer["error"]


@pytest.mark.parametrize(
    ("words", "completions"),
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
def test_bash_completes_commands_and_options(capsys, words, completions):
    """Bash completes commands, their options, and the options' values."""
    assert main(["completion", "bash"]) == 0
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        capsys.readouterr().out
        + f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _z4j_bare; echo ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    assert set(done.stdout.split()) == completions


def test_completion_scripts_for_zsh_and_fish(capsys):
    """Zsh uses the bash script; the fish script has a line for every command and option."""
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
