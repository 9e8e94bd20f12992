"""Command lines: secrets in flags, their errors, and no abbreviations."""

import argparse
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.support.combined_peer import CombinedPeer
from tests.support.environment import set_connection
from tests.support.peer import SECRET_TEXT
from z4j_bare.cli import main, make_engine_main, make_main_for_adapter
from z4j_bare.cli.completion import walk
from z4j_bare.cli.factories import _engine_parser
from z4j_bare.cli.main import COMMANDS, build_parser

VALUE = "Zx-SeKrEt_9vAbCdEfGhIjKlMnOpQrStUvWxYz01234"


def test_doctor_accepts_signing_key(backend, monkeypatch, capsys, tmp_path):
    """``doctor --hmac-secret KEY`` uses the key, in place of variable and file."""
    brain = CombinedPeer(backend)
    set_connection(monkeypatch, brain.url)
    wrong = tmp_path / "key"
    wrong.write_text(VALUE)
    monkeypatch.setenv("Z4J_HMAC_SECRET", VALUE)
    monkeypatch.setenv("Z4J_HMAC_SECRET_FILE", str(wrong))
    try:
        assert main(["doctor", "--hmac-secret", SECRET_TEXT]) == 0
        out = capsys.readouterr().out
        assert "no probe failed" in out
        assert SECRET_TEXT not in out
        assert main(["doctor", f"--hmac-secret={VALUE}"]) == 1
        assert VALUE not in str(capsys.readouterr())
    finally:
        brain.stop()


@pytest.mark.parametrize("flag", ["--hmac-secret", "--token"])
def test_secret_may_begin_with_dash(flag, monkeypatch, capsys):
    """A secret that begins with a dash is the flag's value, and a known flag is not."""
    set_connection(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setenv("Z4J_TRANSPORT", "ws")
    assert main(["doctor", "--no-websocket", flag, f"-{VALUE}"]) == 1
    assert VALUE not in str(capsys.readouterr())
    with pytest.raises(SystemExit) as caught:
        main(["doctor", flag, "--json"])
    assert caught.value.code == 2
    assert f"argument {flag}: expected one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "doctor --hmac-secret VALUE",
        "doctor --hmac-secret=VALUE",
        "doctor --hmac-secret -VALUE",
        "doctor --hmac-secret VALUE --json",
        "doctor --hmac-sec VALUE",
        "doctor --hmca-secret VALUE",
        "doctor --hmac-secretVALUE",
        "doctor --hmac-secret:VALUE",
        "doctor --hmac-secret-fil=VALUE",
        "doctor --hmac-secret-file VALUE",
        "doctor --token-file VALUE",
        "doctor --secret VALUE",
        "doctor --tok VALUE",
        "doctor --no-websocket=VALUE",
        "doctor --hmac-secret VALUE --no-such-flag",
        "doctor VALUE",
        "doctor -VALUE",
        "doctor -hVALUE",
        "run --hmac-secret VALUE",
        "run --tokn VALUE --engine none",
        "run --hmac-secret VALUE --concurrency none",
        "check --hmac_secret VALUE",
        "buffer --token VALUE list",
        "buffer flush --token VALUE --hmac-secret VALUE",
        "--hmac-secret VALUE doctor",
        "--hmac-secret=VALUE doctor",
        "--token -VALUE doctor",
        "doctr --hmac-secret VALUE",
        "--log-level LOUD --token VALUE version",
        "-VALUE",
        "VALUE doctor",
        "Z4J_HMAC_SECRET=VALUE doctor",
        "\u2014hmac-secret=VALUE doctor",
        "hmac-secret=VALUE doctor",
        "buffer VALUE",
        "buffer list VALUE",
        "buffer list \u2014token=VALUE",
        "buffer export -- VALUE",
    ],
)
def test_output_never_shows_secret(words, monkeypatch, capsys, caplog):
    """No output shows the value of a secret flag, of a misspelt flag or of an unknown argument."""
    for name in ("TOKEN", "HMAC_SECRET", "TOKEN_FILE", "HMAC_SECRET_FILE"):
        monkeypatch.setenv(f"Z4J_{name}", "")  # makes monkeypatch remove what the command sets
    argv = [word.replace("VALUE", VALUE) for word in words.split()]
    for run in (main, make_main_for_adapter("django")):
        with suppress(SystemExit):
            assert run(argv) in (1, 2)
        output = str(capsys.readouterr()) + caplog.text
        assert VALUE not in output
        assert any(word in output for word in ("error", "FAIL", "usage: ", "no store"))


def test_misspelt_flag_is_named(capsys):
    """The error of an unknown flag names the flag that it resembles or abbreviates."""
    for word, meant in (
        ("--hmac-secrt", "--hmac-secret?"),
        ("--brain", "--brain-url?"),
        ("--hmac", "--hmac-secret or --hmac-secret-file?"),
        ("--hmac-secretVALUE", "--hmac-secret?"),
    ):
        with pytest.raises(SystemExit):
            main(["doctor", word, VALUE])
        assert f"did you mean {meant}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["doctor", "--xyz"])
    assert "did you mean" not in capsys.readouterr().err


def test_errors_show_arguments_that_are_no_secrets(capsys):
    """An unknown command and an invalid value of another flag are shown."""
    for argv, shown in (
        (["nonsense"], "'nonsense'"),
        (["--log-level", "LOUD", "version"], "'LOUD'"),
        (["run", "--drain", "long", "--token", VALUE], "'long'"),
        (["--token", VALUE, "doctor"], "doctor"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert shown in capsys.readouterr().err


def test_no_parser_accepts_abbreviations():
    """No parser of a command or of an adapter's command line accepts an abbreviated flag."""
    parsers = [build_parser("z4j-bare", COMMANDS), _engine_parser("celery")]
    every = [node for parser in parsers for _, node in walk(parser, ())]
    assert len(every) > 15
    assert [each.prog for each in every if each.allow_abbrev] == []


def test_adapter_command_line_hides_arguments(capsys):
    """An engine's command line hides an unknown flag's value too."""
    engine = make_engine_main("celery", upstream_package="celery")
    for argv in (["doctor", "--js"], ["doctor", "--token", VALUE], ["--token", VALUE, "doctor"]):
        with pytest.raises(SystemExit) as caught:
            engine(argv)
        assert caught.value.code == 2
        assert VALUE not in str(capsys.readouterr())


def test_benchmarks_accept_no_abbreviations():
    """``python -m benchmarks`` accepts no abbreviated flag."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "parity", "--pool", "gevent"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean --pools?" in done.stderr


def test_parser_is_argparse_parser():
    """Code that takes an ``ArgumentParser`` accepts the parser."""
    assert isinstance(build_parser("z4j-bare", ()), argparse.ArgumentParser)
