"""``z4j-bare status`` and ``restart``, the probe of agents, the adapters' command lines."""

import json
import os
import sys
from importlib.metadata import version

import pytest

from tests.support.engines import FakeEngine
from tests.support.peer import SECRET_TEXT, TOKEN, Peer
from tests.support.processes import run_command
from tests.support.top_answers import agent
from z4j_bare import _process_singleton as singleton
from z4j_bare import control, install_agent
from z4j_bare.cli import main, make_engine_main, make_main_for_adapter, status
from z4j_bare.diagnostics.host import probe_agents

SILENT = {"adapter": "bare", "pid": 8, "error": "timed out"}


@pytest.fixture
def set_agents(monkeypatch):
    """``set_agents(*samples)``: the agents that each query returns; the last sample repeats."""
    monkeypatch.setattr(status, "SAMPLE_INTERVAL", 0.01)

    def script(*samples):
        left = list(samples)
        monkeypatch.setattr(
            control,
            "status",
            lambda: [dict(each) for each in (left.pop(0) if len(left) > 1 else left[0])],
        )

    return script


@pytest.mark.parametrize(
    ("agents", "code"),
    [
        ([agent()], 0),
        ([agent(), agent(pid=9)], 0),
        ([agent(), agent(pid=9, connected=False)], 1),
        ([agent(), SILENT], 1),
        ([], 1),
    ],
)
def test_exit_code_is_zero_if_all_are_connected(set_agents, capsys, agents, code):
    """The exit code is 0 if an agent runs and all are connected; ``--quiet`` prints nothing."""
    set_agents(agents)
    assert main(["status", "--quiet"]) == code
    assert capsys.readouterr().out == ""
    assert main(["status", "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], len(answer["agents"])) == (code == 0, len(agents))


def test_table_shows_one_line_per_agent(set_agents, capsys):
    """The table shows name, mode, session, buffer depth, rate and last error of each agent."""
    unconnected = agent(
        pid=9,
        connected=False,
        last_error="connection refused",
        buffered=12,
        oldest_age_seconds=200,
        workers={"celery": []},
    )
    set_agents([agent(), unconnected], [agent(produced=11), unconnected, SILENT])
    assert main(["status"]) == 1
    head, first, second, third = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["agent", "pid", "mode"]
    assert first.split()[:3] == ["celery@a", "7", "gevent"]
    assert "ws for" in first
    assert " 100 " in first
    assert "not connected" in second
    assert "3 min" in second
    assert "connection refused" in second
    assert "no answer" in third
    assert "event loop blocked" in third


def test_agent_without_free_session_is_shown_as_turned_away(set_agents, capsys):
    """An agent beyond the brain's limit of sessions is not connected, and shown as turned away."""
    set_agents([agent(connected=False, turned_away=True, last_error="Z4J_WS_PER_AGENT")])
    assert main(["status"]) == 1
    assert "turned away" in capsys.readouterr().out


#: The health of an agent whose broker is away.
AWAY = {"celery.broker_connected": "False", "celery.broker_error": "TimeoutError"}


def test_agent_without_broker_shows_error(set_agents, capsys):
    """The column of the last error names the broker's error, if there is no other error."""
    set_agents(
        [agent(health=AWAY), agent(pid=9, workers={}, health={**AWAY}, last_error="refused")]
    )
    assert main(["status"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("broker: TimeoutError")
    assert second.endswith("refused")


def test_agents_can_be_selected(set_agents, capsys):
    """Agents can be selected by a worker that they report and by their framework adapter."""
    set_agents([agent(), agent(pid=9, adapter="django", workers={}, connected=False)])
    assert main(["status", "-q", "--worker", "celery@a"]) == 0
    assert main(["status", "-q", "--adapter", "django"]) == 1
    assert main(["status", "--worker", "celery@b"]) == 1
    assert "no agent that reports celery@b runs with Z4J_HOME=" in capsys.readouterr().out


def test_watch_refreshes_until_interrupted(set_agents, capsys, monkeypatch):
    """The history is drawn as bars; the exit code is that of the last sample."""
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            raise KeyboardInterrupt

    set_agents([agent(produced=0)], [agent(produced=5)], [agent(produced=500)])
    monkeypatch.setattr(status.time, "sleep", sleep)
    assert main(["status", "--watch"]) == 0
    text = capsys.readouterr().out
    assert text.count("events/s  ") == 3 + 3
    assert "▁▁█" in text


@pytest.mark.parametrize("command", ["status", "restart", "tasks", "hub", "metrics", "top --once"])
def test_missing_home_is_not_created(command, capsys, monkeypatch, tmp_path):
    """A misspelt Z4J_HOME has no agent, and the command leaves no directory there."""
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "misspelt"))
    assert main(command.split()) == 1
    text = "".join(capsys.readouterr())
    assert f"agent runs with Z4J_HOME={tmp_path / 'misspelt'}" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "restart"])
def test_unusable_home_is_one_line(command, capsys, monkeypatch, tmp_path):
    """A Z4J_HOME that cannot be read is reported as one line with exit code 2."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr("z4j_bare.home.temporary_directories", list)  # nothing replaces Z4J_HOME
    assert main([command]) == 2
    text = capsys.readouterr().err
    assert text.startswith("z4j-bare: cannot use Z4J_HOME=")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x"])
def test_invalid_watch_interval_is_usage_error(seconds):
    """An interval that is not a positive number is a usage error."""
    with pytest.raises(SystemExit) as caught:
        main(["status", "--watch", seconds])
    assert caught.value.code == 2


def test_sparklines_and_durations():
    """The largest value is the highest bar; a duration is shown in its largest unit."""
    assert status.sparkline([]) == ""
    assert status.sparkline([0, 0]) == "▁▁"
    assert status.sparkline([0, 1, 2]) == "▁▅█"
    assert [status.format_duration(each) for each in (5, 65, 7300, 200000)] == [
        "5 s",
        "1 min",
        "2 h",
        "2 d",
    ]


def test_other_process_queries_and_restarts_agent(backend, until):
    """Another process shows a real agent's status and makes it reconnect."""
    peer = Peer(backend)

    runtime = install_agent(
        engines=[FakeEngine()],
        brain_url=peer.url,
        token=TOKEN,
        project_id="p",
        hmac_secret=SECRET_TEXT,
    )
    try:
        until(lambda: peer.frames("heartbeat"))
        code, text = run_command(until, "status", "--json")
        assert code == 0, text
        (found,) = json.loads(text)["agents"]
        assert (found["pid"], found["connected"], found["project"]) == (os.getpid(), True, "p")
        assert TOKEN not in text
        code, text = run_command(until, "restart")
        assert (code, str(os.getpid()) in text) == (0, True)
        until(lambda: len(peer.sessions) > 1)
    finally:
        runtime.stop()
        singleton.clear_runtime()
        peer.stop()
    assert run_command(until, "reload")[0] == 1


@pytest.mark.parametrize(
    ("agents", "verdict", "text"),
    [
        ([], "OK", "no agent is running"),
        ([agent(project="another")], "OK", "no agent is running"),
        ([agent()], "OK", "1 connected"),
        ([agent(), agent(pid=9)], "WARN", "celery@a is reported by processes 7, 9"),
        ([agent(), SILENT], "WARN", "process 8 does not answer (timed out)"),
        (
            [agent(connected=False, last_error="refused")],
            "WARN",
            "process 7 has no session (refused)",
        ),
        ([agent(health=AWAY)], "WARN", "no task can arrive in process 7 (broker: TimeoutError)"),
        ([agent(health={"celery.broker_connected": "True"})], "OK", "1 connected"),
    ],
)
def test_doctor_probes_agents(set_agents, agents, verdict, text):
    """An agent without answer, session or broker, or with another's worker, is a warning."""
    set_agents(agents)
    found = probe_agents("p")
    assert (found.verdict, text in found.message) == (verdict, True)


@pytest.mark.parametrize(
    ("words", "adapter"),
    [
        (["restart"], "django"),
        (["reload"], "django"),
        (["restart", "--adapter", "flask"], "flask"),
        (["restart", "-a", "flask"], "flask"),
        (["restart", "--adapter=flask"], "flask"),
    ],
)
def test_adapter_restarts_its_own_agents(monkeypatch, capsys, words, adapter):
    """``z4j-django restart`` restarts Django's agents, unless another adapter is named."""
    monkeypatch.setattr(control, "send_restart", lambda name: (0, f"restarted {name}"))
    assert make_main_for_adapter("django")(words) == 0
    assert capsys.readouterr().out.strip() == f"restarted {adapter}"


def test_adapter_has_all_commands(monkeypatch, capsys):
    """The adapter's command line has the same commands under the adapter's name."""
    monkeypatch.setattr(sys, "argv", ["z4j-django", "version"])
    main_of_django = make_main_for_adapter("django")
    assert main_of_django() == 0
    assert "z4j-core" in capsys.readouterr().out
    assert main_of_django([]) == 2
    assert "usage: z4j-django" in capsys.readouterr().out


def test_engine_command_line_checks_installation(monkeypatch, capsys):
    """An engine's command line reports what is installed, its version, and a missing broker."""
    engine = make_engine_main("celery", upstream_package="celery", broker_env="CELERY_BROKER_URL")
    assert engine([]) == 2
    assert "usage: z4j-celery" in capsys.readouterr().out
    for command in ("doctor", "check", "status"):
        assert engine([command]) == 0
    assert "CELERY_BROKER_URL is not set" in capsys.readouterr().out
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:hunter2@there")
    monkeypatch.setattr(sys, "argv", ["z4j-celery", "doctor", "--json"])
    assert engine() == 0
    text = capsys.readouterr().out
    assert json.loads(text)["ok"] is True
    assert "hunter2" not in text
    assert engine(["version"]) == 0
    assert capsys.readouterr().out == f"{version('z4j-celery')}\n"
    assert engine(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["celery"] == version("celery")
    missing = make_engine_main(
        "missing", upstream_package="no_such_queue", broker_env=None, upstream_attribute="x"
    )
    assert (missing(["doctor"]), missing(["version"])) == (1, 1)
    assert "pip install no_such_queue" in capsys.readouterr().out
