"""Text for people, JSON for machines: in colour where there is a terminal and rich, plain everywhere else."""

import io
import json
import sys

import pytest

from z4j_bare.cli.output import Output


class Terminal(io.StringIO):
    """Somebody looks at it."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal that knows colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)
    return Terminal()


def everything(output):
    """Use all of it."""
    output.say("[bold]not markup[/bold]")
    output.mark("FAIL", "tcp", "nobody listens", "check the port")
    output.table(["a", "long"], [["1", "x"], ["22", "[y]"]])
    with output.progress("sent", 20) as done:
        for number in range(0, 21, 5):
            done(number)
    with output.live() as update:
        update(lambda: output.say("frame"))


def test_in_a_terminal(terminal):
    """With rich there are colours, and nothing that was said is taken for markup."""
    everything(Output(stream=terminal))
    said = terminal.getvalue()
    assert "\x1b[1;31mFAIL" in said
    assert "[bold]not markup[/bold]" in said
    assert "[y]" in said
    assert "-> check the port" in said
    assert "100%" in said
    assert "frame" in said


def test_no_color(terminal, monkeypatch):
    """NO_COLOR is heard."""
    monkeypatch.setenv("NO_COLOR", "1")
    Output(stream=terminal).mark("FAIL", "tcp", "nobody listens")
    assert "\x1b[1;31m" not in terminal.getvalue()


@pytest.mark.parametrize("why", ["a pipe", "no rich", "a dumb terminal"])
def test_plain(terminal, monkeypatch, why):
    """In a pipe, on a dumb terminal and without rich it is the same text, plain, with progress in lines."""
    stream = io.StringIO() if why == "a pipe" else terminal
    if why == "no rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    if why == "a dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    everything(Output(stream=stream))
    assert stream.getvalue().splitlines() == [
        "[bold]not markup[/bold]",
        "FAIL  tcp          nobody listens",
        "                   -> check the port",
        "a   long",
        "1   x",
        "22  [y]",
        *(f"sent: {number} of 20" for number in range(0, 21, 5)),
        "frame",
    ]


def test_for_machines(terminal):
    """A machine gets one object and nothing else, whatever it looks like."""
    output = Output(machine=True, stream=terminal)
    everything(output)
    output.answer({"ok": True, "path": io})
    assert json.loads(terminal.getvalue())["ok"] is True
    Output(stream=terminal).answer({"nothing": "for people"})
    assert "nothing" not in terminal.getvalue()
