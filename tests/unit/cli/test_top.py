"""``z4j-bare top``: the sections, the rates, the keys, and the screen of a real terminal."""

import json
import re
import signal
import sys
import time
from functools import partial

import pexpect
import pyte
import pytest

from tests.support.top_answers import (
    agent,
    busy_worker,
    counts,
    failure,
    one_agent,
    running,
    script,
)
from z4j_bare.cli import main, screen, top


@pytest.fixture
def samples(monkeypatch):
    """``samples(*samples)``: what each poll of the agents returns; the last one repeats."""
    monkeypatch.setattr(top, "ONCE_INTERVAL", 0.01)

    def set_samples(*given):
        script(monkeypatch.setattr, *given)

    return set_samples


@pytest.fixture
def view(samples):
    """``view(*samples)``: a ``Top`` that has polled each sample."""

    def poll(*given):
        samples(*given)
        parser = main_parser()
        made = top.Top(parser.parse_args([]))
        for _ in given:
            made.poll()
        return made

    return poll


def main_parser():
    """Return a parser with the options of ``top``."""
    import argparse

    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    return parser


def texts(view, width=80, height=24):
    """Return the lines of the screen without trailing spaces."""
    return [line.text.rstrip() for line in view.lines(width, height)]


def test_once_prints_all_sections(samples, capsys):
    """``--once`` prints agents, busiest and running tasks, and failures without arguments."""
    samples(busy_worker(100), busy_worker(200))
    assert main(["top", "--once"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert re.search(r"celery@a +7 +gevent +ws for .+ 6 +0 +12\.3 ms", out)
    assert re.search(r"shop\.pay +0 +\d+\S* +200 +0 +0 +20\.0 ms", out)
    assert re.search(r"shop\.mail +0 +0 +3 +2 +1 ", out)
    assert re.search(r"2 min +shop\.slow_0 +shop/pay\.py:88 in charge +socket\.recv", out)
    assert re.search(r"d +shop\.mail +SMTPServerDisconnected +celery@a", out)


def test_json_has_schema_and_all_sections(samples, capsys):
    """``--json`` prints one document; the busiest tasks have their rates."""
    samples(busy_worker(100), busy_worker(200))
    assert main(["top", "--once", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == (1, True)
    pay = next(each for each in document["busiest"] if each["name"] == "shop.pay")
    assert pay["rate"] > 0
    assert pay["runtime"] == pytest.approx(0.02)
    assert len(document["running"]) == 30
    assert document["failures"][0]["exception"] == "SMTPServerDisconnected"


def test_exit_code_is_that_of_status(samples, capsys):
    """Without an agent, or with one that is not connected, the exit code is 1."""
    samples({"status": []})
    assert main(["top", "--once"]) == 1
    assert "no agent runs with Z4J_HOME=" in capsys.readouterr().out
    silent = {"adapter": "bare", "pid": 8, "error": "timed out"}
    samples({"status": [agent(connected=False, last_error="refused"), silent]})
    assert main(["top", "--once"]) == 1
    out = capsys.readouterr().out
    assert "not connected: refused" in out
    assert "no answer" in out


def test_rates_are_those_between_two_samples(view, monkeypatch):
    """The counts of all queues are added; an agent that appears has no rate in its first sample."""
    clock = iter((0.0, 10.0, 20.0, 30.0))
    monkeypatch.setattr(top.time, "monotonic", lambda: next(clock))
    made = view(
        {"status": []},
        one_agent(metrics=[counts("a", 100), counts("a", 50, queue="late")]),
        one_agent(metrics=[counts("a", 110, 5), counts("a", 55, queue="late"), counts("b", 30)]),
    )
    found = {each.name: each for each in made._busy}
    assert (found["a"].rate, found["b"].rate) == (2.0, 3.0)
    assert (found["a"].done, found["a"].failed) == (165, 5)


def test_keys_sort_busiest_tasks(view):
    """Each ``s`` sorts by the next column, and after the last by the first again."""
    made = view(
        one_agent(
            tasks=[running("b", 5.0)],
            metrics=[counts("b", 1, 9, seconds=1.0), counts("a", 9, 0, seconds=90.0)],
        ),
    )

    def names():
        return [line.split()[0] for line in texts(made) if line[:2] in ("a ", "b ")]

    made._busy = [each._replace(rate=float(each.name == "a")) for each in made._busy]
    orders = []
    for _ in range(6):
        orders.append(names())
        assert made.press("s")
    assert [order[0] for order in orders] == ["a", "b", "a", "b", "a", "a"]


def test_keys_filter_all_sections(view):
    """A filter hides what it does not match in every section; Escape shows all again."""
    made = view(
        one_agent(
            tasks=[running("shop.pay", 5.0), running("shop.mail", 4.0)],
            metrics=[counts("shop.pay", 1), counts("shop.mail", 1)],
            failures=[failure(1.0, "shop.pay"), failure(2.0, "shop.mail")],
        )
    )
    assert str(texts(made)).count("shop.mail") == 3
    for key in "/PAX\x7fY":
        assert made.press(key)
    assert "filter: PAY_" in texts(made)[-1]
    assert made.press("\n")
    shown = str(texts(made))
    assert (shown.count("shop.pay"), shown.count("shop.mail")) == (3, 0)
    assert "filter: PAY" in texts(made)[-1]
    assert made.press("\x1b")
    assert str(texts(made)).count("shop.mail") == 3


def test_q_in_filter_does_not_quit(view):
    """While a filter is typed, the keys are text; the end of the input quits in any case."""
    made = view(one_agent())
    assert made.press("/")
    assert made.press("q")
    assert not made.press(screen.END)
    assert made.press("\n")
    assert not made.press("q")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60), (20, 5)])
def test_screen_fits_into_terminal(view, width, height):
    """No line is wider and no screen is higher than the terminal; hidden rows are counted."""
    made = view(busy_worker(100), busy_worker(200))
    lines = texts(made, width, height)
    assert max(map(len, lines)) <= max(width, len(lines[0]), len(lines[-1]))
    assert len(lines) <= height
    if height == 24:
        assert lines[-1].endswith("q quit")
        assert any(re.search(r"waiting in.*\(\+\d+\)$", line) for line in lines)
        assert any("SMTPServer" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "position", "waiting", "shown"),
    [
        (
            "shop.pay",
            "shop/pay.py:88 in charge",
            "requests.get (socket.recv)",
            r"1 min  shop\.pay +shop/pay\.py:88 in charge +requests\.get \(socket\.recv\)",
        ),
        (
            "shop.orders.tasks.collect_payment",
            "shop/orders/tasks/payments.py:128 in Collector.collect_payment",
            "subprocess.run (Popen.wait)",
            r"1 min  …\S*collect_payment +payments\.py:128 in collect_payment +subprocess\.run$",
        ),
    ],
)
def test_narrow_screen_keeps_file_line_and_function(view, name, position, waiting, shown):
    """In 80 columns a running task still shows its file, line, function and called function."""
    task = running(name, 75.0) | {"position": position, "waiting_in": waiting}
    (line,) = [
        line for line in texts(view(one_agent(tasks=[task]))) if "88 in" in line or ":128" in line
    ]
    assert re.search(shown, line)
    assert len(line) <= 80


def test_task_in_child_shows_pid_of_child(view):
    """A prefork task has no position; the pid of its child process is shown instead."""
    task = {key: value for key, value in running("a", 5.0).items() if key != "position"}
    assert any("(in child process 7)" in line for line in texts(view(one_agent(tasks=[task]))))


def test_refused_requests_are_shown(view):
    """An agent with ``Z4J_INSPECT=0`` is named, because its tasks are missing in the sections."""
    refusal = [{"adapter": "bare", "pid": 7, "error": "Z4J_INSPECT=0 forbids this request"}]
    made = view({"status": [agent()], "tasks": refusal, "hub": refusal, "metrics": refusal})
    assert (
        texts(made)[1] == "no tasks and no counts of process 7: Z4J_INSPECT=0 forbids this request"
    )
    assert made.document()["refused"] == refusal


def test_table_shortens_longest_flexible_column():
    """Only flexible columns are shortened, the longest first; the end shows it."""
    columns = (screen.Column("n", right=True), screen.Column("name", flexible=True))
    head, row = screen.table(columns, [["12", "a" * 40]], 20)
    assert (head, row) == (" n  name            ", f"12  {'a' * 15}…")


def test_lines_are_shared_fairly():
    """A part with few rows leaves its lines to the others."""
    assert screen.share(10, [2, 100, 100]) == [2, 4, 4]
    assert screen.share(10, [1, 1, 1]) == [1, 1, 1]
    assert screen.share(0, [5]) == [0]


class Terminal:
    """A command in a terminal of 80 columns and 24 lines."""

    def __init__(self, *arguments):
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.Stream(self._screen)
        self.raw = ""
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "tests.support.top_answers", *arguments],
            dimensions=(24, 80),
            encoding="utf-8",
            # A shell lets its background jobs ignore SIGINT, and the command would inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def text(self):
        """Return the screen."""
        return "\n".join(self._screen.display)

    def wait(self, pattern):
        """Wait until the screen shows ``pattern``, and return the match."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = re.search(pattern, self.text())
            if found:
                return found
            self._read()
        raise AssertionError(f"the screen does not show {pattern!r}:\n{self.text()}")

    def end(self):
        """Wait for the end and return the exit code."""
        while self._read():
            pass
        self.child.close()
        return self.child.exitstatus

    def _read(self):
        try:
            data = self.child.read_nonblocking(65536, timeout=0.2)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True


@pytest.fixture
def terminal(mode):
    """``terminal(*arguments)``: start a command in a terminal; it ends with the test."""
    if mode != "threads":
        pytest.skip("the command is another process, which is the same in every mode")
    started = []

    def start(*arguments):
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.child.close(force=True)


def test_terminal_shows_top_and_obeys_keys(terminal):
    """In 80 columns all sections are visible; keys filter, freeze and quit; the screen is left."""
    made = terminal("top", "--interval", "0.2")
    made.wait(r"shop\.pay +0 +[1-9]")
    shown = made.text()
    for part in ("celery@a", "shop.slow_0", "socket.recv", "SMTPServerDisconnected", "q quit"):
        assert part in shown
    made.child.send(" ")
    made.wait("frozen")
    done = made.wait(r"shop\.pay +0 +\S+ +(\d+)")[1]
    made.child.send("s")
    made.wait("sorted by failed")
    assert made.wait(r"shop\.pay +0 +\S+ +(\d+)")[1] == done
    made.child.send(" ")
    made.child.send("/")
    made.wait("filter: _")
    made.child.send("mail")
    made.wait("filter: mail_")
    made.child.send("\r")
    made.wait(r"filter: mail  sorted")
    assert "shop.pay" not in made.text()
    assert "shop.mail" in made.text()
    made.child.send("q")
    assert made.end() == 0
    assert made.raw.endswith("\x1b[?25h\x1b[?1049l")


def test_terminal_shows_status_watch(terminal):
    """``status --watch`` redraws the table and the bars, and Ctrl-C ends it with its exit code."""
    made = terminal("status", "--watch", "0.2")
    made.wait(r"buffered  [▁-█]{3}")
    assert made.wait(r"celery@a +7 +gevent")
    made.child.sendintr()
    assert made.end() == 0
    assert made.raw.endswith("\x1b[?25h\x1b[?1049l")
