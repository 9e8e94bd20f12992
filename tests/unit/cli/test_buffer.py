"""``z4j-bare buffer`` lists all stores, and exports, sends and deletes orphaned ones."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from z4j_core.transport.frames import CommandResultPayload

from tests.support.combined_peer import CombinedPeer
from tests.support.environment import set_connection
from tests.support.existing_agent import (
    existing_event,
    existing_frame,
    make_existing_buffer,
    running_owner,
)
from tests.support.peer import SECRET
from z4j_bare.buffer.files import lock_path
from z4j_bare.buffer.open_runs import OpenRuns, runs_path
from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT
from z4j_bare.buffer.store import BufferStore
from z4j_bare.cli import main
from z4j_bare.install import resolve_config
from z4j_bare.settings import deployment_id, load_settings
from z4j_bare.wire import frames
from z4j_bare.wire.canonical import canonical


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home; the stores of other tests in the fallback directories are not listed."""
    monkeypatch.setattr(
        "z4j_bare.buffer.files.candidate_directories", lambda path: [type(tmp_path)(path).parent]
    )
    directory = tmp_path / "home"
    directory.mkdir(mode=0o700)
    return directory


def event(number, text="x"):
    return canonical({"number": number, "text": text})


def make_orphan(home, name, events=3, results=0, deployment="d", kind=EVENT, text="x"):
    """Create the store of a process that has ended; return its path."""
    store = BufferStore(home / f"z4j-green-{name}.sqlite", deployment=deployment)
    store.append([(kind, "", event(number, text)) for number in range(events)])
    result = frames.command_result("success", {"n": 1}, None, None)
    store.append(
        [(RESULT, f"00000000-0000-4000-8000-{number:012d}", result) for number in range(results)]
    )
    store.close()
    return store.path


OWNER_PROCESS = """
import sys, pathlib
from z4j_bare.buffer.store import BufferStore
store = BufferStore(pathlib.Path(sys.argv[1]))
store.append([("event", "", b"{}")] * 2)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def store_in_use(home):
    """Yield the path of a store whose process is running."""
    path = home / "z4j-green-live.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER_PROCESS, str(path)],
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


def run_json(capsys, *words):
    """Run ``buffer ... --json``; return the exit code and the JSON answer, or the error."""
    capsys.readouterr()
    code = main(["buffer", *words, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else captured.err


def test_list_and_stats_show_all_stores(home, capsys):
    """Every store is listed with its rows and its process; the totals count orphaned rows."""
    make_orphan(home, "orphan", events=3, results=2)
    with store_in_use(home):
        code, found = run_json(capsys, "list")
        by_name = {os.path.basename(each["path"]): each for each in found["stores"]}
        assert code == 0
        assert by_name["z4j-green-orphan.sqlite"]["rows"] == {"event": 3, "result": 2}
        assert not by_name["z4j-green-orphan.sqlite"]["living"]
        assert by_name["z4j-green-live.sqlite"]["living"]
        code, totals = run_json(capsys, "stats")
        assert (
            code,
            totals["stores"],
            totals["left_behind"],
            totals["rows"],
            totals["rows_left_behind"],
        ) == (0, 2, 1, 7, 5)
        assert totals["oldest_age_seconds"] >= 0
        assert main(["buffer", "list"]) == 0
        text = capsys.readouterr().out
        assert "running" in text
        assert "ended" in text
        assert main(["buffer", "stats"]) == 0
        assert "rows left behind     5" in capsys.readouterr().out


def test_reading_actions_change_nothing(home, capsys):
    """List, stats and export remove no row and create no file but the store's lock."""
    path = make_orphan(home, "orphan")
    before = sorted(each.name for each in home.iterdir())
    for action in ("list", "stats", "export"):
        assert main(["buffer", action]) == 0
    assert {each.name for each in home.iterdir()} <= {*before, lock_path(path).name}
    store = BufferStore(path, deployment="d", create=False)
    assert store.size() == 3
    store.close()


def test_empty_home_is_not_an_error(home, capsys):
    """Without any store the exit code is 0."""
    assert main(["buffer", "list"]) == 0
    assert "there is no store" in capsys.readouterr().out
    assert run_json(capsys, "stats")[1]["rows"] == 0


def test_corrupt_store_is_reported(home, capsys):
    """A corrupt store is listed with its error and makes the exit code 1; others are listed too."""
    make_orphan(home, "orphan")
    (home / "z4j-green-bad.sqlite").write_bytes(b"x" * 5000)
    code, found = run_json(capsys, "list")
    assert (code, sorted(bool(each["trouble"]) for each in found["stores"])) == (1, [False, True])
    assert main(["buffer", "export", "z4j-green-bad.sqlite"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_export_writes_orphaned_rows(home, capsys, tmp_path):
    """Every orphaned row becomes a JSON line in a new private file; no file is overwritten."""
    make_orphan(home, "orphan", events=2, results=1)
    with store_in_use(home) as path:
        assert main(["buffer", "export"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["kind"], line["store"]) for line in lines] == [
            (kind, "z4j-green-orphan.sqlite") for kind in (EVENT, EVENT, RESULT)
        ]
        assert lines[1]["payload"] == {"number": 1, "text": "x"}
        target = tmp_path / "rows.jsonl"
        assert run_json(capsys, "export", "-o", str(target)) == (
            0,
            {"schema": 1, "rows": 3, "file": str(target)},
        )
        assert target.stat().st_mode & 0o777 == 0o600
        assert main(["buffer", "export", "-o", str(target)]) == 1
        assert f"{target}: File exists" in capsys.readouterr().err
        assert main(["buffer", "export", str(path)]) == 3
        assert "running process" in capsys.readouterr().err


def press_ctrl_d(_question):
    raise EOFError


def test_drop_requires_selection_and_confirmation(home, capsys, monkeypatch):
    """Drop requires names or --all, and a confirmation; it deletes no store in use."""
    path = make_orphan(home, "orphan")
    make_orphan(home, "other")
    assert main(["buffer", "drop"]) == 2
    assert "--all" in capsys.readouterr().err
    assert main(["buffer", "drop", "nonsense"]) == 2
    assert "there is no store with that name (not shown)" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["buffer", "drop", path.name]) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _question: "n")
    assert main(["buffer", "drop", path.name]) == 1
    assert path.exists()
    monkeypatch.setattr("builtins.input", press_ctrl_d)
    assert main(["buffer", "drop", path.name]) == 1
    assert path.exists()
    monkeypatch.setattr("builtins.input", lambda _question: "y")
    assert main(["buffer", "drop", path.name]) == 0
    assert not path.exists()
    assert not lock_path(path).exists()
    with store_in_use(home) as used:
        assert main(["buffer", "drop", "--yes", used.name]) == 3
        code, found = run_json(capsys, "drop", "--all", "--yes")
        assert (code, found["rows"]) == (0, 3)
        assert used.exists()


@pytest.fixture
def brain(backend, monkeypatch):
    """A scripted brain, and the settings to connect to it."""
    scripted = CombinedPeer(backend)
    set_connection(monkeypatch, scripted.url)
    yield scripted
    scripted.stop()


def own_deployment():
    return deployment_id(resolve_config(load_settings()), SECRET)


def test_flush_sends_all_rows(home, brain, capsys):
    """All rows are sent in frames that fit, without hello or poll; the empty files are deleted."""
    brain.http.body_limit = 8192
    make_orphan(home, "one", events=700, deployment=own_deployment())
    make_orphan(home, "two", events=5, results=2, deployment=own_deployment())
    brain.http.command("retry_task")
    assert main(["buffer", "flush"]) == 0
    text = capsys.readouterr().out
    assert "sent 707 of 707 rows, 0 rows are left" in text
    assert "sent: " in text
    assert len(brain.http.events()) == 705
    assert all(
        isinstance(frame.payload, CommandResultPayload)
        for frame in brain.http.frames("command_result")
    )
    assert len(brain.http.frames("command_result")) == 2
    assert list(home.iterdir()) == []
    assert len(brain.http.commands) == 1
    assert brain.http.errors == []
    assert brain.ws.sessions == []


def test_flush_keeps_rows_that_brain_does_not_accept(home, brain, capsys):
    """Rows are kept that are too large, of another deployment, or rejected with the token."""
    brain.http.body_limit = 8192
    large = make_orphan(home, "large", events=1, deployment=own_deployment(), text="y" * 9000)
    other = make_orphan(home, "projections", kind=PROJECTION, deployment=own_deployment())
    foreign = make_orphan(home, "foreign", deployment="another")
    assert main(["buffer", "flush"]) == 1
    text = capsys.readouterr().out
    assert "larger than the brain accepts" in text
    assert "another deployment" in text
    assert "schedule snapshots" in text
    assert all(path.exists() for path in (large, other, foreign))
    valid = make_orphan(home, "valid", deployment=own_deployment())
    brain.http.token = "another"
    assert main(["buffer", "flush", valid.name]) == 1
    assert "FAIL" in capsys.readouterr().out
    code, found = run_json(capsys, "flush")
    assert (code, found["sent"], [each["store"] for each in found["passed_over"]]) == (
        1,
        0,
        [foreign.name],
    )
    assert "Z4J_TOKEN" in found["error"]
    assert run_json(capsys, "stats", valid.name)[1]["rows"] == 3


def test_flush_refuses_store_in_use(home, brain, capsys):
    """A store whose process is running is not sent, not even when it is named."""
    with store_in_use(home) as path:
        assert main(["buffer", "flush", path.name]) == 3
        assert run_json(capsys, "flush")[0] == 0
        assert path.exists()
    deadline = time.monotonic() + 30
    while main(["buffer", "list"]) or "running" in capsys.readouterr().out:
        assert time.monotonic() < deadline


def leave_open_runs(store, deployment, number=2):
    """Leave the open runs of a process that has died, beside a store."""
    ring = SimpleNamespace(produced=0)
    runs = OpenRuns(ring, lambda: deployment)
    runs.enable()
    described = runs.describe("celery", {"task_name": "shop.pay"})
    for index in range(number):
        ring.produced += 1
        runs.start(described, f"run-{index}", 1_700_000_000.0 + index, 0)
    runs.attach(store)
    runs._lock.release()
    return runs_path(store)


def test_flush_reports_open_runs_after_rows(home, brain, capsys):
    """Runs of a store that was sent, and of one that is gone, are reported after the rows."""
    sent = make_orphan(home, "sent", events=3, deployment=own_deployment())
    leave_open_runs(sent, own_deployment())
    leave_open_runs(home / "z4j-green-gone.sqlite", own_deployment(), 120)
    assert main(["buffer", "flush"]) == 0
    assert "reported 122 runs" in capsys.readouterr().out
    kinds = [event.get("kind") for event in brain.http.events()]
    assert kinds[3:] == ["task.started", "task.failed"] * 122
    assert "task.failed" not in kinds[:3]
    assert list(home.iterdir()) == []


def test_flush_keeps_open_runs_that_brain_does_not_accept(home, brain, capsys):
    """Runs of another deployment, of unsent rows, and of a rejected upload stay in their files."""
    foreign = leave_open_runs(home / "z4j-green-foreign.sqlite", "another")
    projections = make_orphan(home, "rows", kind=PROJECTION, deployment=own_deployment())
    unsent = leave_open_runs(projections, own_deployment())
    assert main(["buffer", "flush"]) == 1
    assert "another deployment" in capsys.readouterr().out
    own = leave_open_runs(home / "z4j-green-own.sqlite", own_deployment())
    brain.http.token = "another"
    assert main(["buffer", "flush"]) == 1
    assert foreign.exists()
    assert unsent.exists()
    assert own.exists()
    assert brain.http.events() == []


def test_drop_deletes_open_runs(home):
    """The runs of a dropped store are not reported later."""
    store = make_orphan(home, "dropped")
    runs = leave_open_runs(store, "d")
    assert main(["buffer", "drop", "--all", "--yes"]) == 0
    assert not runs.exists()


def leave_existing(home, *, key=SECRET, pid=4376, events=2):
    """Create the buffer of an ended process of the existing agent; return its path."""
    rows = [("event_batch", existing_frame(existing_event(number))) for number in range(events)]
    return make_existing_buffer(home, key, rows, pid=pid)


def test_list_shows_buffers_of_existing_agent(home, capsys):
    """Each is listed with its rows and with what to do; the JSON object has a list of its own."""
    path, empty = leave_existing(home), leave_existing(home, pid=5, events=0)
    unknown = home / "buffer-6.sqlite"
    unknown.write_bytes(b"noise" * 100)
    assert main(["buffer", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "an agent of its project sends the events when it starts" in lines[str(path)]
    assert "4376 ended" in lines[str(path)]
    assert lines[str(empty)].endswith("of the existing agent")
    assert "only the agent that wrote it can send its events" in lines[str(unknown)]
    with running_owner(path):
        assert main(["buffer", "list", path.name]) == 0
        assert "4376 running" in capsys.readouterr().out
    code, found = run_json(capsys, "list", path.name)
    assert (code, found["stores"]) == (0, [])
    (row,) = found["existing_agent"]
    assert (row["path"], row["living"], row["rows"]["event_batch"]) == (str(path), False, 2)


def test_flush_sends_events_of_existing_agent(home, brain, capsys):
    """The events reach the brain, and the file is deleted; a file of another key stays."""
    path = leave_existing(home)
    foreign = leave_existing(home, key=b"x" * 32, pid=7)
    code, found = run_json(capsys, "flush")
    assert (code, found["sent"], found["left"]) == (1, 2, 2)
    assert "another key" in found["passed_over"][0]["why"]
    assert [event["task_id"] for event in brain.http.events()] == ["t0", "t1"]
    assert (path.exists(), foreign.exists()) == (False, True)
    assert list(home.glob("z4j-green-*")) == []


def test_flush_of_named_buffer_sends_only_this_buffer(home, brain, capsys):
    """A buffer of the existing agent can be named; other stores stay."""
    path, other = leave_existing(home), leave_existing(home, pid=7)
    orphan = make_orphan(home, "orphan", deployment=own_deployment())
    code, found = run_json(capsys, "flush", path.name)
    assert (code, found["sent"], found["left"]) == (0, 2, 0)
    assert (path.exists(), other.exists(), orphan.exists()) == (False, True, True)


def test_drop_deletes_named_buffer_of_existing_agent(home, capsys):
    """--all deletes no buffer of the existing agent, a name does, but not while it is in use."""
    path = leave_existing(home)
    assert run_json(capsys, "drop", "--all", "--yes")[1]["dropped"] == []
    with running_owner(path):
        assert main(["buffer", "drop", "--yes", path.name]) == 3
        assert "running process" in capsys.readouterr().err
    code, found = run_json(capsys, "drop", "--yes", path.name)
    assert (code, found) == (0, {"schema": 1, "dropped": [str(path)], "rows": 2})
    assert not path.exists()
