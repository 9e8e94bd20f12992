"""``z4j-bare tasks`` and ``hub``: what they print and their exit codes."""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest

from z4j_bare import control
from z4j_bare.cli import main


def answer(**changes):
    """Return the answer of an agent, with ``changes``."""
    return {
        "adapter": "bare",
        "pid": 7,
        "schema": 1,
        "concurrency": "gevent",
        "workers": {"celery": ["celery@a"]},
        **changes,
    }


TASK = {
    "engine": "celery",
    "id": "id-1",
    "name": "shop.pay",
    "worker": "celery@a",
    "queue": "celery",
    "pid": 7,
    "age_seconds": 75.0,
    "position": "shop/pay.py:88 in charge",
    "waiting_in": "socket.recv",
    "eager": [{"id": "id-2", "name": "shop.log"}],
    "greenlets": [{"position": "shop/pay.py:9 in poll", "waiting_in": "time.sleep"}],
}

LAG = {
    "samples": 2,
    "p50_seconds": 0.001,
    "p99_seconds": 0.5,
    "max_seconds": 2.25,
    "histogram": {},
    "recent": {"samples": 2, "p50_seconds": 0.001, "p99_seconds": 0.5, "max_seconds": 0.7},
}

HOLD = {
    "place": "shop/pay.py:9 in poll",
    "task": "shop.pay",
    "holds": 3,
    "single_holds": 3,
    "total_seconds": 4.5,
    "longest_seconds": 1.75,
}

SILENT = {"adapter": "bare", "pid": 8, "error": "timed out"}


@pytest.fixture
def set_answers(monkeypatch):
    """``set_answers(*answers)``: what all agents answer; returns the list of requests."""
    requests, timeouts = [], []

    def script(*answers):
        def query(verb, parameters=None, timeout=0.0):
            requests.append((verb, parameters))
            timeouts.append(timeout)
            return [dict(each) for each in answers]

        monkeypatch.setattr(control, "query", query)
        script.timeouts = timeouts
        return requests

    return script


def test_tasks_prints_position_and_what_runs_below(set_answers, capsys):
    """A task has a row; what it runs eagerly and its greenlets have rows below it."""
    set_answers(answer(tasks=[TASK]))
    assert main(["tasks"]) == 0
    header, row, eager, greenlet = capsys.readouterr().out.splitlines()
    assert header.split() == ["age", "name", "id", "worker", "pid", "position", "waiting", "in"]
    assert row.split()[:2] == ["1", "min"]
    assert "shop/pay.py:88 in charge" in row
    assert row.endswith("socket.recv")
    assert "shop.log (eager)" in eager
    assert greenlet.split()[0] == "greenlet"
    assert greenlet.endswith("time.sleep")


def test_tasks_prints_longest_run_of_all_agents_first(set_answers, capsys):
    """The tasks of several agents are sorted by age."""
    young = {**TASK, "id": "young", "age_seconds": 1.0, "eager": [], "greenlets": []}
    set_answers(answer(tasks=[young]), answer(pid=9, tasks=[TASK]))
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert out.index("id-1") < out.index("young")


def test_tasks_stack_reads_source_in_this_process(set_answers, capsys):
    """``--stack`` prints each frame like a traceback, with the line of the source."""
    frame = {"file": __file__, "line": 1, "function": "charge", "module": "m", "locals": []}
    requests = set_answers(answer(tasks=[{**TASK, "stack": [frame]}]))
    assert main(["tasks", "--task", "id-1", "--stack", "--all-frames"]) == 0
    out = capsys.readouterr().out
    assert f'File "{__file__}", line 1, in charge' in out
    assert "``z4j-bare tasks`` and ``hub``" in out
    assert requests == [("tasks", {"task": "id-1", "stack": True, "all_frames": True})]


def test_tasks_selects_agents_of_worker(set_answers, capsys):
    """``--worker`` shows only the tasks of the agent that reports this worker."""
    set_answers(answer(tasks=[TASK]))
    assert main(["tasks", "--worker", "celery@b"]) == 1
    assert "no agent that reports celery@b runs with Z4J_HOME=" in capsys.readouterr().out


def test_silent_agent_is_named(set_answers, capsys):
    """An agent that does not answer is named, and the exit code is 1."""
    set_answers(answer(tasks=[], has_hub=True, lag=LAG, holds=[]), SILENT)
    assert main(["tasks"]) == 1
    cause = "process 8: timed out: its process is stopped, or a task holds its hub"
    assert cause in capsys.readouterr().out
    assert main(["hub"]) == 1
    assert cause in capsys.readouterr().out


def test_prefork_child_has_no_position(set_answers, capsys):
    """The row of a child's task says that its position is unknown."""
    row = {key: value for key, value in TASK.items() if key not in ("position", "waiting_in")}
    set_answers(answer(tasks=[row]))
    assert main(["tasks"]) == 0
    assert "(in a child process)" in capsys.readouterr().out


def test_task_without_known_thread_is_not_said_to_be_in_child(set_answers, capsys):
    """A task without frames is shown as unknown, in the table and with ``--stack``."""
    set_answers(answer(tasks=[{**TASK, "position": None, "waiting_in": None, "stack": []}]))
    for options in ([], ["--stack"]):
        assert main(["tasks", *options]) == 0
        out = capsys.readouterr().out
        assert "(unknown)" in out
        assert "child process" not in out


@pytest.mark.parametrize("width", [40, 80, 400])
def test_narrow_terminal_shows_whole_ids_and_positions(set_answers, width, monkeypatch):
    """If the terminal is too narrow for the table, lines show the texts of the table."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    set_answers(answer(tasks=[{**TASK, "name": "shop.orders.collect_payment", "id": "i" * 36}]))
    terminal = StringIO()
    terminal.isatty = lambda: True
    with redirect_stdout(terminal):
        assert main(["tasks"]) == 0
    out = terminal.getvalue()
    assert out.startswith("age") == (width == 400)
    for text in ("1 min", "shop.orders.collect_payment", "i" * 36, "celery@a", "7", "shop.log"):
        assert text in out
    if width < 400:
        assert "shop/pay.py:88 in charge, waiting in socket.recv\n" in out
        assert "shop/pay.py:9 in poll, waiting in time.sleep\n" in out
    if width == 80:
        assert max(map(len, out.splitlines())) <= width


def test_missing_task_is_named(set_answers, capsys):
    """``--task`` with an id that no agent runs is reported."""
    requests = set_answers(answer(tasks=[]))
    assert main(["tasks", "--task", "id-9"]) == 0
    assert capsys.readouterr().out.startswith("task id-9 is not running in the processes of these")
    assert requests[0][1]["task"] == "id-9"


def test_agents_without_answer_are_not_said_to_run_no_task(set_answers, capsys):
    """If no agent has answered, the output does not claim that no task runs."""
    set_answers(SILENT)
    assert main(["tasks"]) == 1
    assert "no task" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["tasks", "hub", "status", "top --once"])
def test_wrong_worker_shows_names_of_workers(command, set_answers, capsys):
    """``--worker`` with a wrong name lists the agents and their workers."""
    set_answers(answer())
    assert main([*command.split(), "--worker", "celery@b"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("no agent that reports celery@b runs with Z4J_HOME=")
    assert out.endswith(": the agents there are bare in process 7 (celery@a)\n")


def test_missing_home_is_named_as_default(set_answers, capsys, monkeypatch, tmp_path):
    """Without ``Z4J_HOME`` the message says that the default directory was searched."""
    monkeypatch.delenv("Z4J_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    set_answers()
    assert main(["tasks"]) == 1
    assert "/.z4j, the default, because Z4J_HOME is not set: run" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["tasks", "hub"])
def test_json_has_schema_version(command, set_answers, capsys):
    """``--json`` prints one document with a version."""
    set_answers(answer(tasks=[TASK], has_hub=True, lag=LAG, holds=[HOLD]))
    assert main([command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["ok"]) == (1, True)
    assert document["agents"][0]["workers"] == {"celery": ["celery@a"]}


def test_hub_prints_lags_and_holds(set_answers, capsys):
    """``hub`` prints the quantiles of the lag, and the places that held the hub."""
    set_answers(answer(has_hub=True, lag=LAG, holds=[HOLD]))
    assert main(["hub"]) == 0
    out = capsys.readouterr().out
    assert "celery@a (pid 7): lag of the gevent hub" in out
    assert "4.50 s  1.75 s   3      one holder  shop.pay  shop/pay.py:9 in poll" in out


def test_hub_says_that_threads_have_no_hub(set_answers, capsys):
    """Without a hub the lag is explained, and there is no table of holds."""
    set_answers(answer(concurrency="threads", has_hub=False, lag=LAG, holds=[]))
    assert main(["hub"]) == 0
    assert "this process has no hub" in capsys.readouterr().out


def test_hub_prints_histogram_without_empty_ranges(set_answers, capsys):
    """The histogram of the lags is one line with the ranges that occurred."""
    histogram = {"0.001": 90, "0.002": 0, "5": 2, "inf": 1}
    set_answers(answer(has_hub=True, lag={**LAG, "histogram": histogram}, holds=[]))
    assert main(["hub"]) == 0
    assert "lags since start: 90 up to 1 ms, 2 up to 5 s, 1 above 5 s\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "stacks.txt"], "--output needs --profile SECONDS"),
        (["--profile", "9", "--output", "missing/stacks.txt"], "cannot write --output missing/"),
    ],
)
def test_output_is_checked_before_profile(options, message, set_answers, capsys):
    """A file that cannot be written causes an error before the agents start to sample."""
    requests = set_answers(answer(has_hub=True, lag=LAG, holds=[]))
    assert main(["hub", *options]) == 2
    assert capsys.readouterr().err.startswith(f"z4j-bare: {message}")
    assert requests == []


def test_hub_profile_writes_stacks(set_answers, capsys, tmp_path):
    """``--profile`` starts a profile, waits for its end and writes collapsed stacks."""
    profile = {"seconds": 0.01, "running": False, "holds": [{**HOLD, "single_holds": 1}]}
    requests = set_answers(
        answer(has_hub=True, lag=LAG, holds=[], profile=profile, stacks={"a.run;b.spin": 540})
    )
    path = tmp_path / "stacks.txt"
    assert main(["hub", "--profile", "0.01", "--output", str(path)]) == 0
    assert [parameters for _, parameters in requests] == [{"profile": 0.01}, {"result": True}]
    # The result must arrive although a task holds the hub at the end of the profile.
    assert set_answers.timeouts[1] >= 60
    assert path.read_text() == "a.run;b.spin 540\n"
    assert "many steps" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "-1", "601", "nan", "soon"])
def test_invalid_profile_is_usage_error(seconds, capsys):
    """A duration outside the agent's limits is refused with the limits."""
    with pytest.raises(SystemExit, match="2"):
        main(["hub", "--profile", seconds])
    assert "above 0 and at most 600" in capsys.readouterr().err
