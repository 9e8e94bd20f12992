"""What the dead have left is looked at, saved, sent and thrown away; what belongs to the living is only looked at."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from z4j_core.transport.frames import CommandResultPayload

from tests.support.front import Front
from tests.support.peer import SECRET, SECRET_TEXT, TOKEN
from z4j_bare.buffer.files import lock_path
from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT
from z4j_bare.buffer.store import BufferStore
from z4j_bare.cli import main
from z4j_bare.install import resolve_config
from z4j_bare.settings import deployment_id, load_settings
from z4j_bare.wire import frames
from z4j_bare.wire.canonical import canonical


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of our own, and temporary directories that nobody else's stores lie in."""
    monkeypatch.setattr("z4j_bare.buffer.files.candidate_directories", lambda path: [type(tmp_path)(path).parent])
    made = tmp_path / "home"
    made.mkdir(mode=0o700)
    return made


def event(number, text="x"):
    return canonical({"number": number, "text": text})


def leave(home, name, events=3, results=0, deployment="d", kind=EVENT, text="x"):
    """Leave a store behind, as a process that has ended; return its path."""
    store = BufferStore(home / f"z4j-green-{name}.sqlite", deployment=deployment)
    store.append([(kind, "", event(number, text)) for number in range(events)])
    answer = frames.command_result("success", {"n": 1}, None, None)
    store.append(
        [(RESULT, f"00000000-0000-4000-8000-{number:012d}", answer) for number in range(results)]
    )
    store.close()
    return store.path


LIVE = """
import sys, pathlib
from z4j_bare.buffer.store import BufferStore
store = BufferStore(pathlib.Path(sys.argv[1]))
store.append([("event", "", b"{}")] * 2)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def living(home):
    """A store whose process lives; yields its path."""
    path = home / "z4j-green-live.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield path
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def answer(capsys, *words):
    """Run ``buffer ... --json``; return exit code and answer."""
    capsys.readouterr()
    code = main(["buffer", *words, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else said.err


def test_list_and_stats(home, capsys):
    """Every store is listed with its rows, age, size and whose it is; the sums tell what was left behind."""
    leave(home, "dead", events=3, results=2)
    with living(home):
        code, found = answer(capsys, "list")
        by_name = {os.path.basename(each["path"]): each for each in found["stores"]}
        assert code == 0
        assert by_name["z4j-green-dead.sqlite"]["rows"] == {"event": 3, "result": 2}
        assert not by_name["z4j-green-dead.sqlite"]["living"]
        assert by_name["z4j-green-live.sqlite"]["living"]
        code, sums = answer(capsys, "stats")
        assert (
            code,
            sums["stores"],
            sums["left_behind"],
            sums["rows"],
            sums["rows_left_behind"],
        ) == (0, 2, 1, 7, 5)
        assert sums["oldest_age_seconds"] >= 0
        assert main(["buffer", "list"]) == 0
        said = capsys.readouterr().out
        assert "lives" in said
        assert "is gone" in said
        assert main(["buffer", "stats"]) == 0
        assert "rows left behind     5" in capsys.readouterr().out


def test_looking_changes_nothing(home, capsys):
    """Looking at a store takes no row, makes no file and leaves its owner to whoever adopts it."""
    path = leave(home, "dead")
    before = sorted(each.name for each in home.iterdir())
    for action in ("list", "stats", "export"):
        assert main(["buffer", action]) == 0
    assert {each.name for each in home.iterdir()} <= {*before, lock_path(path).name}
    store = BufferStore(path, deployment="d", create=False)
    assert store.size() == 3
    store.close()


def test_an_empty_home(home, capsys):
    """Where nothing was left nothing is wrong."""
    assert main(["buffer", "list"]) == 0
    assert "no store lies" in capsys.readouterr().out
    assert answer(capsys, "stats")[1]["rows"] == 0


def test_a_file_that_cannot_be_read(home, capsys):
    """A corrupt store is told of, and makes the exit code 1; the others are shown all the same."""
    leave(home, "dead")
    (home / "z4j-green-bad.sqlite").write_bytes(b"x" * 5000)
    code, found = answer(capsys, "list")
    assert (code, sorted(bool(each["trouble"]) for each in found["stores"])) == (1, [False, True])
    assert main(["buffer", "export", "z4j-green-bad.sqlite"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_export(home, capsys, tmp_path):
    """Every row of the dead is a JSON line, in a new file that is private; an existing one is not overwritten."""
    leave(home, "dead", events=2, results=1)
    with living(home) as path:
        assert main(["buffer", "export"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["kind"], line["store"]) for line in lines] == [
            (kind, "z4j-green-dead.sqlite") for kind in (EVENT, EVENT, RESULT)
        ]
        assert lines[1]["payload"] == {"number": 1, "text": "x"}
        target = tmp_path / "rows.jsonl"
        assert answer(capsys, "export", "-o", str(target)) == (0, {"rows": 3, "file": str(target)})
        assert target.stat().st_mode & 0o777 == 0o600
        assert main(["buffer", "export", "-o", str(target)]) == 1
        assert f"{target}: File exists" in capsys.readouterr().err
        assert main(["buffer", "export", str(path)]) == 3
        assert "living process" in capsys.readouterr().err


def no_more(_question):
    raise EOFError


def test_drop(home, capsys, monkeypatch):
    """Dropping wants names or --all, and somebody's yes; the files of the living stay."""
    path = leave(home, "dead")
    leave(home, "other")
    assert main(["buffer", "drop"]) == 2
    assert "--all" in capsys.readouterr().err
    assert main(["buffer", "drop", "nonsense"]) == 2
    assert "no store 'nonsense'" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["buffer", "drop", path.name]) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _question: "n")
    assert main(["buffer", "drop", path.name]) == 1
    assert path.exists()
    monkeypatch.setattr("builtins.input", no_more)
    assert main(["buffer", "drop", path.name]) == 1
    assert path.exists()
    monkeypatch.setattr("builtins.input", lambda _question: "y")
    assert main(["buffer", "drop", path.name]) == 0
    assert not path.exists()
    assert not lock_path(path).exists()
    with living(home) as alive:
        assert main(["buffer", "drop", "--yes", alive.name]) == 3
        code, found = answer(capsys, "drop", "--all", "--yes")
        assert (code, found["rows"]) == (0, 3)
        assert alive.exists()


@pytest.fixture
def front(backend, monkeypatch):
    """A scripted brain, and the settings that lead to it."""
    made = Front(backend)
    for name, value in {
        "BRAIN_URL": made.url,
        "PROJECT_ID": "p",
        "TOKEN": TOKEN,
        "HMAC_SECRET": SECRET_TEXT,
    }.items():
        monkeypatch.setenv(f"Z4J_{name}", value)
    yield made
    made.stop()


def ours():
    return deployment_id(resolve_config(load_settings()), SECRET)


def test_flush(home, front, capsys):
    """Everything is sent in frames that fit, results first, without a hello or a poll; the emptied files are gone."""
    front.http.body_limit = 8192
    leave(home, "one", events=700, deployment=ours())
    leave(home, "two", events=5, results=2, deployment=ours())
    front.http.command("retry_task")
    assert main(["buffer", "flush"]) == 0
    said = capsys.readouterr().out
    assert "707 of 707 rows are with the brain, 0 are still here" in said
    assert "sent: " in said
    assert len(front.http.events()) == 705
    assert all(
        isinstance(frame.payload, CommandResultPayload)
        for frame in front.http.frames("command_result")
    )
    assert len(front.http.frames("command_result")) == 2
    assert list(home.iterdir()) == []
    assert len(front.http.commands) == 1
    assert front.http.mishaps == []
    assert front.ws.sessions == []


def test_what_is_not_sent_stays(home, front, capsys):
    """Rows too large, of another kind or of another project stay, and so does everything when the brain refuses."""
    front.http.body_limit = 8192
    large = leave(home, "large", events=1, deployment=ours(), text="y" * 9000)
    other = leave(home, "projections", kind=PROJECTION, deployment=ours())
    foreign = leave(home, "foreign", deployment="another")
    assert main(["buffer", "flush"]) == 1
    said = capsys.readouterr().out
    assert "larger than the brain takes" in said
    assert "another deployment" in said
    assert "goes on with their stream" in said
    assert all(path.exists() for path in (large, other, foreign))
    fine = leave(home, "fine", deployment=ours())
    front.http.token = "another"
    assert main(["buffer", "flush", fine.name]) == 1
    assert "FAIL" in capsys.readouterr().out
    code, found = answer(capsys, "flush")
    assert (code, found["sent"], [each["store"] for each in found["passed_over"]]) == (
        1,
        0,
        [foreign.name],
    )
    assert "Z4J_TOKEN" in found["error"]
    assert answer(capsys, "stats", fine.name)[1]["rows"] == 3


def test_flush_leaves_the_living_alone(home, front, capsys):
    """A store whose process lives is not flushed, not even by name."""
    with living(home) as path:
        assert main(["buffer", "flush", path.name]) == 3
        assert answer(capsys, "flush")[0] == 0
        assert path.exists()
    deadline = time.monotonic() + 30
    while main(["buffer", "list"]) or "lives" in capsys.readouterr().out:
        assert time.monotonic() < deadline
