"""What an operator sees of the agents that run here, and what a probe is told by the exit code."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.peer import SECRET_TEXT, TOKEN, Peer
from z4j_bare import _process_singleton as singleton
from z4j_bare import control, install_agent
from z4j_bare.cli import main, make_engine_main, make_main_for_adapter, status
from z4j_bare.diagnostics.agents import probe_agents


def agent(pid=7, **changes):
    """What an agent that is well says of itself."""
    return {
        "adapter": "bare", "pid": pid, "project": "p", "connected": True, "connected_at": 0.0, "concurrency": "gevent",
        "transport": "ws", "workers": {"celery": ["celery@a"]}, "agent_name": None, "oldest_age_seconds": None, "produced": 10,
        "acked": 4, "buffered": 6, "adopting": 0, "last_error": "", **changes,
    }  # fmt: skip


SILENT = {"adapter": "bare", "pid": 8, "error": "timed out"}


@pytest.fixture
def answers(monkeypatch):
    """``answers(*lists)``: what the looks to come are told; the last one for ever."""
    monkeypatch.setattr(status, "SAMPLE", 0.01)

    def script(*lists):
        left = list(lists)
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
def test_probes(answers, capsys, agents, code):
    """A probe fails unless there is an agent and every one is connected; quiet says nothing."""
    answers(agents)
    assert main(["status", "--quiet"]) == code
    assert capsys.readouterr().out == ""
    assert main(["status", "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], len(answer["agents"])) == (code == 0, len(agents))


def test_the_table(answers, capsys):
    """A line for each agent: who, in which mode, since when, how much waits, how fast, what went wrong."""
    apart = agent(
        pid=9,
        connected=False,
        last_error="connection refused",
        buffered=12,
        oldest_age_seconds=200,
        workers={"celery": []},
    )
    answers([agent(), apart], [agent(produced=11), apart, SILENT])
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
    assert "hub blocked" in third


def test_one_worker_or_adapter(answers, capsys):
    """One agent can be asked for by the worker it reports, or by its framework."""
    answers([agent(), agent(pid=9, adapter="django", workers={}, connected=False)])
    assert main(["status", "-q", "--worker", "celery@a"]) == 0
    assert main(["status", "-q", "--adapter", "django"]) == 1
    assert main(["status", "--worker", "celery@b"]) == 1
    assert "no agent that reports celery@b runs here" in capsys.readouterr().out


def test_watch(answers, capsys, monkeypatch):
    """The watch goes on until it is interrupted, with what it saw as bars, and then says how the last look was."""
    looks = []

    def sleep(_seconds):
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    answers([agent(produced=0)], [agent(produced=5)], [agent(produced=500)])
    monkeypatch.setattr(status.time, "sleep", sleep)
    assert main(["status", "--watch"]) == 0
    said = capsys.readouterr().out
    assert said.count("events/s  ") == 3 + 3
    assert "▁▁█" in said


@pytest.mark.parametrize("command", ["status", "restart"])
def test_a_home_that_is_none(command, capsys, monkeypatch, tmp_path):
    """A home that cannot be looked into is one line that names the setting."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "file" / "home"))
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("z4j-bare: Z4J_HOME=")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x"])
def test_bad_intervals(seconds):
    """An interval that is none is a usage error."""
    with pytest.raises(SystemExit) as caught:
        main(["status", "--watch", seconds])
    assert caught.value.code == 2


def test_bars_and_spans():
    """The largest value is the highest bar, nothing is the lowest, and times come in the unit that fits."""
    assert status.sparkline([]) == ""
    assert status.sparkline([0, 0]) == "▁▁"
    assert status.sparkline([0, 1, 2]) == "▁▅█"
    assert [status.span(each) for each in (5, 65, 7300, 200000)] == ["5 s", "1 min", "2 h", "2 d"]


def test_a_living_agent(backend, until, monkeypatch):
    """A real agent is found from another process, told apart from a home without one, and told to connect anew."""
    peer = Peer(backend)

    class Engine:
        name = "stub"

        def capabilities(self):
            return set()

    runtime = install_agent(
        engines=[Engine()], brain_url=peer.url, token=TOKEN, project_id="p", hmac_secret=SECRET_TEXT
    )
    try:
        until(lambda: peer.frames("heartbeat"))
        code, said = elsewhere(until, "status", "--json")
        assert code == 0, said
        (found,) = json.loads(said)["agents"]
        assert (found["pid"], found["connected"], found["project"]) == (os.getpid(), True, "p")
        assert TOKEN not in said
        code, said = elsewhere(until, "restart")
        assert (code, str(os.getpid()) in said) == (0, True)
        until(lambda: len(peer.sessions) > 1)
    finally:
        runtime.stop()
        singleton.clear_runtime()
        peer.stop()
    assert elsewhere(until, "reload")[0] == 1


def elsewhere(until, *words):
    """Run the command in a process of its own while this one's hub goes on; return exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "z4j_bare", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: process.poll() is not None)
        return process.returncode, process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("agents", "verdict", "said"),
    [
        ([], "OK", "none runs here"),
        ([agent(project="another")], "OK", "none runs here"),
        ([agent()], "OK", "1 connected"),
        ([agent(), agent(pid=9)], "WARN", "celery@a is reported by processes 7, 9"),
        ([agent(), SILENT], "WARN", "process 8 does not answer (timed out)"),
        (
            [agent(connected=False, last_error="refused")],
            "WARN",
            "process 7 has no session (refused)",
        ),
    ],
)
def test_the_doctor_looks_at_agents(answers, agents, verdict, said):
    """Agents that are silent, without a session, or that report one worker twice are named."""
    answers(agents)
    found = probe_agents("p")
    assert (found.verdict, said in found.message) == (verdict, True)


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
def test_adapters_restart_their_own(monkeypatch, capsys, words, adapter):
    """``z4j-django restart`` means Django's agents, unless others are named."""
    monkeypatch.setattr(control, "send_restart", lambda name: (0, f"told {name}"))
    assert make_main_for_adapter("django")(words) == 0
    assert capsys.readouterr().out.strip() == f"told {adapter}"


def test_adapters_have_all_other_commands(monkeypatch, capsys):
    """As a console script, without arguments, and by the adapter's name."""
    monkeypatch.setattr(sys, "argv", ["z4j-django", "version"])
    main_of_django = make_main_for_adapter("django")
    assert main_of_django() == 0
    assert "z4j-core" in capsys.readouterr().out
    assert main_of_django([]) == 2
    assert "usage: z4j-django" in capsys.readouterr().out


def test_engines(monkeypatch, capsys):
    """An engine's command line says what is installed, and what is not."""
    engine = make_engine_main("celery", upstream_package="celery", broker_env="CELERY_BROKER_URL")
    assert engine([]) == 2
    assert "usage: z4j-celery" in capsys.readouterr().out
    for command in ("doctor", "check", "status"):
        assert engine([command]) == 0
    assert "CELERY_BROKER_URL is not set" in capsys.readouterr().out
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:hunter2@there")
    monkeypatch.setattr(sys, "argv", ["z4j-celery", "doctor", "--json"])
    assert engine() == 0
    said = capsys.readouterr().out
    assert json.loads(said)["ok"] is True
    assert "hunter2" not in said
    assert engine(["version"]) == 0
    nobody = make_engine_main(
        "nobody", upstream_package="no_such_queue", broker_env=None, upstream_attribute="x"
    )
    assert (nobody(["doctor"]), nobody(["version"])) == (1, 1)
    assert "pip install no_such_queue" in capsys.readouterr().out
