"""Buffers that the existing agent has left: which are sent, which are reported, none is damaged."""

import hashlib
import json
import os
import sqlite3
from contextlib import closing

import pytest

from tests.support.adopter import Adopter
from tests.support.existing_agent import (
    existing_event,
    existing_frame,
    make_existing_buffer,
    make_old,
    running_owner,
)
from z4j_bare.buffer import BufferStore, new_store_path
from z4j_bare.buffer.adopt_loop import SCAN_INTERVAL
from z4j_bare.buffer.errors import BUSY, classify
from z4j_bare.buffer.existing_agent import (
    STEP_ROWS,
    ExistingBuffer,
    NoEventsError,
    key_digest,
    list_existing_buffers,
    read_existing_buffer,
)
from z4j_bare.errors import LocalStorageError
from z4j_bare.wire.fit import MARK

KEY = b"01234567890123456789012345678901"
DIGEST = key_digest(KEY)


@pytest.fixture
def target(home):
    store = BufferStore(new_store_path(home))
    yield store
    store.close()


def frames(*events):
    return [("event_batch", existing_frame(event)) for event in events]


def leave(home, *events, key=KEY, **options):
    return make_existing_buffer(home.parent, key, frames(*events), **options)


def events_of(store):
    return [json.loads(row.payload) for row in store.drain(0, 10**5, 1 << 30, ("event",))]


def move_all(path, target):
    """Run all steps; return the outcomes."""
    buffer = ExistingBuffer(path, DIGEST, 10**6)
    outcomes = []
    try:
        while not outcomes or outcomes[-1] != "done":
            outcomes.append(buffer.step(target))
    finally:
        buffer.close()
    return outcomes


def test_events_are_moved_unchanged(home, target):
    """Every event keeps its id, time and data; the empty file is deleted with its log."""
    events = [existing_event(number) for number in range(2 * STEP_ROWS + 7)]
    path = leave(home, *events, age=3600.0)
    report = read_existing_buffer(path, DIGEST)
    assert (report.running, report.pid, report.events, report.problem) == (False, 4376, 207, "")
    assert report.oldest_age == pytest.approx(3600, abs=60)
    assert move_all(path, target) == ["moved"] * 3 + ["done"]
    assert events_of(target) == events
    assert target.stats().oldest_age == pytest.approx(3600, abs=60)
    assert list_existing_buffers(home) == []
    assert [each.name for each in home.parent.iterdir() if each.name.startswith("buffer-")] == []


def test_frame_with_several_events_is_moved_whole(home, target):
    """Each event of a frame becomes a row."""
    events = [existing_event(number) for number in range(5)]
    path = make_existing_buffer(home.parent, KEY, [("event_batch", existing_frame(*events))])
    move_all(path, target)
    assert events_of(target) == events


def test_event_is_made_fit_for_brain(home, target):
    """NUL and a long task id, which the brain's database refuses, are changed and marked."""
    path = leave(home, existing_event(1, task_id="x" * 400, data={"args": ["a\0b"], "queue": "q"}))
    move_all(path, target)
    (event,) = events_of(target)
    assert len(event["task_id"]) < 200
    assert event["data"]["args"] == ["a\ufffdb"]
    assert set(event["data"][MARK]) == {"task_id", "nul"}


def test_buffer_of_running_process_is_left_alone(home, target):
    """While the process runs, its file is reported as running and cannot be claimed."""
    path = leave(home, existing_event(1))
    with running_owner(path):
        assert read_existing_buffer(path).running
        with pytest.raises(LocalStorageError) as caught:
            ExistingBuffer(path, DIGEST, 1000)
        assert classify(caught.value) == BUSY
    assert move_all(path, target) == ["moved", "done"]


def test_new_file_is_left_alone(home):
    """A file that was just created belongs to a process that has not locked it yet."""
    path = leave(home, existing_event(1))
    os.utime(path)
    with pytest.raises(LocalStorageError, match="just changed") as caught:
        ExistingBuffer(path, DIGEST, 1000)
    assert classify(caught.value) == BUSY
    assert read_existing_buffer(path).events == 1


def test_claimed_buffer_is_locked(home):
    """Two claims exclude each other, as a claim and a running process do."""
    path = leave(home, existing_event(1))
    first = ExistingBuffer(path, DIGEST, 1000)
    with pytest.raises(LocalStorageError) as caught:
        ExistingBuffer(path, DIGEST, 1000)
    assert classify(caught.value) == BUSY
    first.close()
    first.close()
    ExistingBuffer(path, DIGEST, 1000).close()
    assert read_existing_buffer(path).events == 1


def test_buffer_of_other_project_is_left_alone(home):
    """A file of a project with another key is reported and not changed."""
    path = leave(home, existing_event(1), key=b"x" * 32)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_existing_buffer(path).problem == ""
    assert read_existing_buffer(path, DIGEST).problem == "it belongs to a project with another key"
    with pytest.raises(LocalStorageError, match="another key"):
        ExistingBuffer(path, DIGEST, 1000)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("damage", ["no mark", "other table", "noise", "empty", "no table"])
def test_unknown_layout_is_reported(home, damage):
    """A file of another layout is reported with what to do, and is not changed."""
    path = leave(home, existing_event(1))
    if damage == "noise":
        path.write_bytes(b"noise" * 1000)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        statement = {
            "no mark": "DELETE FROM _meta WHERE key = 'deployment'",
            "other table": "ALTER TABLE entries RENAME COLUMN payload TO body",
            "no table": "DROP TABLE entries",
        }[damage]
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement)
    make_old(path)
    before = path.read_bytes()
    assert "only the agent that wrote it can send its events" in read_existing_buffer(path).problem
    with pytest.raises(LocalStorageError):
        ExistingBuffer(path, DIGEST, 1000)
    assert path.read_bytes() == before


def test_unsafe_file_is_refused(home):
    """A link and a file that others can write are not opened."""
    path = leave(home, existing_event(1))
    link = path.with_name("buffer-1.sqlite")
    link.symlink_to(path)
    path.chmod(0o666)
    for each, why in ((link, "cannot open"), (path, "writable by others")):
        assert why in read_existing_buffer(each).problem
        with pytest.raises(LocalStorageError, match=why):
            ExistingBuffer(each, DIGEST, 1000)


def test_other_rows_stay_in_file(home, target):
    """Rows that are no events, and events that cannot be read, stay; the file is not deleted."""
    rows = [
        ("command_result", b"{}"),
        *frames(existing_event(1)),
        ("event_batch", b"{"),
        ("event_batch", existing_frame({"id": "only"})),
        ("event_batch", existing_frame(existing_event(2, task_id=None))),
        ("event_batch", b'{"payload":{"events":7}}'),
        *frames(existing_event(3)),
    ]
    path = make_existing_buffer(home.parent, KEY, rows)
    assert move_all(path, target) == ["moved", "done"]
    assert [event["task_id"] for event in events_of(target)] == ["t1", "t3"]
    make_old(path)
    report = read_existing_buffer(path)
    assert (report.events, report.others) == (4, 1)


def test_row_without_time_is_moved(home, target):
    """A row whose time is no number counts as new."""
    path = leave(home, existing_event(1))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE entries SET created_at = 'yesterday'")
    make_old(path)
    assert read_existing_buffer(path).oldest_age == pytest.approx(0, abs=60)
    move_all(path, target)
    assert target.stats().oldest_age == pytest.approx(0, abs=60)


def test_buffer_without_events_is_not_claimed(home):
    """An empty buffer is left alone."""
    path = leave(home)
    with pytest.raises(NoEventsError):
        ExistingBuffer(path, DIGEST, 1000)
    assert path.exists()


def test_failed_deletion_does_not_move_events_twice(home, target, monkeypatch):
    """If the rows cannot be deleted after the move, the next step deletes them first."""
    path = leave(home, existing_event(1), existing_event(2))
    buffer = ExistingBuffer(path, DIGEST, 1000)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LocalStorageError):
            buffer.step(target)
        other.execute("ROLLBACK")
    assert buffer.rows_left() == 2
    assert buffer.step(target) == "done"
    buffer.close()
    assert len(events_of(target)) == 2
    assert not path.exists()


@pytest.fixture
def adopter(home):
    one = Adopter(home, claim_existing=lambda path: ExistingBuffer(path, DIGEST, 200))
    yield one
    one.end()


def messages(caplog, level="WARNING"):
    return [each.getMessage() for each in caplog.records if each.levelname == level]


def test_agent_adopts_with_one_warning(home, adopter, caplog):
    """The events are moved at the start, with one warning that names the file."""
    caplog.set_level("INFO")
    path = leave(home, *map(existing_event, range(150)))
    adopter.run(3 * SCAN_INTERVAL)
    assert len(adopter.rows()) == 150
    assert messages(caplog) == [
        f"z4j: the existing agent left unsent events in {path}: sending them now"
    ]
    adopted = "adopted 150 rows from buffer-4376.sqlite"
    assert any(adopted in each for each in messages(caplog, "INFO"))
    assert not path.exists()


def test_agent_adopts_later_buffer(home, adopter):
    """The buffer of a process that ends later is adopted at the next scan."""
    path = leave(home, existing_event(1))
    with running_owner(path):
        adopter.run(100.0)
        assert adopter.rows() == []
    adopter.run(2 * SCAN_INTERVAL)
    assert len(adopter.rows()) == 1


def test_large_buffer_is_moved_as_it_is_acknowledged(home, adopter):
    """While enough rows wait in the store, the other events stay in the file."""
    path = leave(home, *map(existing_event, range(700)))
    adopter.run(30.0)
    assert 200 <= len(adopter.rows()) < 300
    seen = 0
    while rows := adopter.rows():
        seen += len(rows)
        adopter.acknowledge(5000)
        adopter.backend.advance(1)
    assert seen == 700
    assert not path.exists()


@pytest.mark.parametrize("case", ["other key", "unknown layout", "unreadable rows"])
def test_agent_reports_buffer_that_it_cannot_send(home, adopter, caplog, case):
    """One warning says why the events are not sent and what to do."""
    if case == "unreadable rows":
        make_existing_buffer(home.parent, KEY, [("event_batch", b"{")])
    else:
        path = leave(home, existing_event(1), key=b"x" * 32 if case == "other key" else KEY)
        if case == "unknown layout":
            path.write_bytes(b"noise" * 1000)
            make_old(path)
    adopter.run(10 * SCAN_INTERVAL)
    assert adopter.rows() == []
    *sending, warning = messages(caplog)
    assert "buffer-4376.sqlite" in warning
    assert "z4j-bare buffer drop" in warning
    if case == "unreadable rows":
        assert "1 rows of" in warning
    assert len(sending) == (case == "unreadable rows")


def test_fifo_with_name_of_buffer_does_not_block(home, adopter, caplog):
    """A FIFO is reported like any file that is not a buffer, and the next buffer is sent."""
    fifo = leave(home, existing_event(1)).with_name("buffer-1.sqlite")
    os.mkfifo(fifo, 0o600)
    os.utime(fifo, (0, 0))
    assert "not a regular file" in read_existing_buffer(fifo).problem
    adopter.run(5 * SCAN_INTERVAL)
    assert len(adopter.rows()) == 1
    assert "not a regular file" in messages(caplog)[0]


def test_agent_ignores_empty_buffer(home, adopter, caplog):
    """A buffer without events causes no warning and stays."""
    path = leave(home)
    adopter.run(5 * SCAN_INTERVAL)
    assert messages(caplog) == []
    assert path.exists()
