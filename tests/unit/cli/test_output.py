"""Output as text with and without a terminal, and as JSON."""

import io
import json
import sys

import pytest

from z4j_bare.cli.output import Output


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal with colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)
    return Terminal()


def write_everything(output):
    """Call every method that writes text."""
    output.print_line("[bold]not markup[/bold]")
    output.print_verdict("FAIL", "tcp", "connection refused", "check the port")
    output.print_table(["a", "long"], [["1", "x"], ["22", "[y]"]])
    with output.progress("sent", 20) as done:
        for number in range(0, 21, 5):
            done(number)
    with output.live() as redraw:
        redraw(lambda: output.print_line("frame"))


def test_terminal_with_rich_gets_colours(terminal):
    """Rich draws colours and does not interpret the text as markup."""
    write_everything(Output(stream=terminal))
    text = terminal.getvalue()
    assert "\x1b[1;31mFAIL" in text
    assert "[bold]not markup[/bold]" in text
    assert "[y]" in text
    assert "-> check the port" in text
    assert "100%" in text
    assert "frame" in text


def test_no_color_disables_colours(terminal, monkeypatch):
    """NO_COLOR is honoured."""
    monkeypatch.setenv("NO_COLOR", "1")
    Output(stream=terminal).print_verdict("FAIL", "tcp", "connection refused")
    assert "\x1b[1;31m" not in terminal.getvalue()


@pytest.mark.parametrize("case", ["a pipe", "no rich", "a dumb terminal"])
def test_plain_text_without_capable_terminal(terminal, monkeypatch, case):
    """A pipe, a dumb terminal and a missing rich all get the same plain text."""
    stream = io.StringIO() if case == "a pipe" else terminal
    if case == "no rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    if case == "a dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    write_everything(Output(stream=stream))
    assert stream.getvalue().splitlines() == [
        "[bold]not markup[/bold]",
        "FAIL  tcp          connection refused",
        "                   -> check the port",
        "a   long",
        "1   x",
        "22  [y]",
        *(f"sent: {number} of 20" for number in range(0, 21, 5)),
        "frame",
    ]


def test_machine_output_is_one_json_object(terminal):
    """With ``json_only`` only the JSON object is written, without it only the text."""
    output = Output(json_only=True, stream=terminal)
    write_everything(output)
    output.print_json({"ok": True, "path": io})
    assert json.loads(terminal.getvalue()) == {"schema": 1, "ok": True, "path": str(io)}
    Output(stream=terminal).print_json({"nothing": "as text"})
    assert "nothing" not in terminal.getvalue()
