"""The file of a store: who may see it, what happens when it is locked, corrupt, foreign, full or somebody else's."""

import fcntl
import os
import sqlite3
import stat
import time
from contextlib import closing

import pytest

from z4j_bare.buffer import EVENT, RESULT, BufferStore, files, new_store_path, schema
from z4j_bare.buffer import report as inspect
from z4j_bare.buffer.errors import BUSY, CORRUPT, FULL, OTHER, READ_ONLY, classify
from z4j_bare.buffer.files import create_file, lock_path
from z4j_bare.errors import LocalStorageError

NOW = 1_000_000.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "home" / "store.sqlite"


@pytest.fixture
def opened():
    """Opens stores and closes them after the test."""
    stores = []

    def build(path, **options):
        options = {"busy_timeout": 0, "clock": lambda: NOW, **options}
        stores.append(BufferStore(path, **options))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(path):
    return sorted(found.name for found in path.parent.iterdir())


def row(payload=b"a", kind=EVENT):
    return [(kind, "t", payload)]


# -- where


def test_the_configured_path_gives_the_directory_only(tmp_path):
    """The name is ours, holds the pid and is new each time, so that stores of the asyncio agent are left alone."""
    configured = tmp_path / "deep" / "er" / "buffer-123.sqlite"
    first, second = new_store_path(configured), new_store_path(str(configured))
    assert first != second
    assert first.parent == second.parent == configured.parent
    assert first.name.startswith(f"z4j-green-{os.getpid()}-")
    assert not configured.exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_directory_and_files_are_private(tmp_path, opened, umask):
    """Every directory made is 0700 and every file 0600, log, index and lock included, under any umask."""
    before = os.umask(umask)
    try:
        store = opened(new_store_path(tmp_path / "a" / "b" / "buffer-1.sqlite"))
        store.append(row())
    finally:
        os.umask(before)
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]
    assert len(names(store.path)) == 4
    assert {mode(store.path.parent / name) for name in names(store.path)} == {0o600}


def test_a_home_directory_is_understood(monkeypatch, tmp_path):
    """``~`` means the home of the user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_store_path("~/.z4j/buffer-1.sqlite").parent == tmp_path / ".z4j"


def test_a_directory_that_others_may_write_is_refused(path):
    """The message names the directory, its mode, our uid and the setting that helps."""
    path.parent.mkdir()
    for open_to in (0o770, 0o707):
        path.parent.chmod(open_to)
        with pytest.raises(
            LocalStorageError, match=rf"{path.parent}.*0{open_to:o}.*uid {os.geteuid()}.*Z4J_HOME"
        ):
            new_store_path(path)
        with pytest.raises(LocalStorageError, match="is writable by others"):
            BufferStore(path)
    assert list(path.parent.iterdir()) == []


def test_a_directory_that_others_may_read_is_accepted(path, opened):
    """Reading names is no danger: the files are 0600."""
    path.parent.mkdir()
    path.parent.chmod(0o755)
    assert opened(path).append(row()) == 0


def test_a_linked_directory_is_refused(tmp_path, path):
    """A symbolic link may point somewhere else tomorrow."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    path.parent.symlink_to(real)
    with pytest.raises(LocalStorageError, match=r"symbolic link.*Z4J_HOME"):
        new_store_path(path)


def test_a_directory_of_somebody_else_is_refused(path, monkeypatch):
    """Its owner could replace our file."""
    path.parent.mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(
        LocalStorageError, match=rf"belongs to uid {me}; this process runs as uid {me + 1}"
    ):
        new_store_path(path)


def test_a_file_in_place_of_the_directory_is_refused(path):
    """A plain file is no directory, and nothing can be made below it."""
    path.parent.write_bytes(b"")
    with pytest.raises(LocalStorageError, match="not a directory"):
        new_store_path(path)
    with pytest.raises(LocalStorageError, match="cannot create"):
        new_store_path(path / "below" / "buffer-1.sqlite")


def test_a_read_only_directory_is_reported(path, monkeypatch):
    """The error of the file system comes with the name of the file and of the setting, and is told from others."""
    path.parent.mkdir(mode=0o700)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "open_file", refuse)
    with pytest.raises(
        LocalStorageError, match=r"cannot create .*store.sqlite.lock.*Read-only.*Z4J_HOME"
    ) as caught:
        BufferStore(path)
    assert classify(caught.value) == READ_ONLY


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_write_permission_is_reported(path):
    """The real thing, for everybody but root."""
    path.parent.mkdir(mode=0o500)
    with pytest.raises(LocalStorageError, match="Z4J_HOME"):
        BufferStore(path)


def test_a_file_is_never_created_over_another(path):
    """Creation follows no link and takes no existing name."""
    path.parent.mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(FileExistsError):
        create_file(path)
    with pytest.raises(LocalStorageError, match="not a regular file"):
        BufferStore(path)
    assert path.is_symlink()
    assert not (path.parent / "elsewhere").exists()


def test_a_file_that_others_may_read_is_not_opened(path, opened):
    """A store whose mode was widened may have been read or changed; it is refused."""
    store = opened(path)
    store.append(row())
    store.close()
    path.chmod(0o640)
    with pytest.raises(LocalStorageError, match=r"accessible to others \(mode 0640\)"):
        BufferStore(path)


def test_adopting_wants_an_existing_file(path):
    """``create=False`` makes nothing: no file, no lock file left behind."""
    with pytest.raises(LocalStorageError, match="cannot open the store"):
        BufferStore(path, create=False)
    assert names(path) == []


# -- whose


def test_a_second_opener_in_this_process_is_refused(path, opened):
    """A record lock does not exclude its own process; our table does, and the first owner loses nothing."""
    store = opened(path)
    with pytest.raises(LocalStorageError, match="open in this process"):
        BufferStore(path)
    linked = path.parent.parent / "link"
    linked.symlink_to(path.parent)
    with pytest.raises(LocalStorageError, match="symbolic link"):
        BufferStore(linked / path.name)
    store.append(row())
    assert store.size() == 1


def test_a_lock_file_that_was_deleted_meanwhile_is_no_lock(path, monkeypatch):
    """An owner may delete its store between our opening of the lock file and our lock on it."""
    take = fcntl.lockf

    def delete_first(descriptor, command):
        lock_path(path).unlink()
        return take(descriptor, command)

    monkeypatch.setattr(fcntl, "lockf", delete_first)
    with pytest.raises(LocalStorageError, match="was just deleted"):
        BufferStore(path)
    monkeypatch.undo()
    store = BufferStore(path)
    store.close()


def test_a_store_of_another_deployment_is_refused_and_left_alone(path, opened):
    """Rows of one project never reach another's brain; the message does not spell the deployment."""
    store = opened(path, deployment="project-a")
    store.append(row())
    store.close()
    with pytest.raises(LocalStorageError, match="another deployment") as caught:
        BufferStore(path, deployment="project-b")
    assert "project-a" not in str(caught.value)
    assert opened(path, deployment="project-a").size() == 1


@pytest.mark.parametrize("known_as", ["key-2 place-1", "key-1 place-2"])
def test_one_name_in_common_makes_one_deployment(path, opened, known_as):
    """After its key was rotated, or its brain has moved, a project's rows are still its own."""
    store = opened(path, deployment="key-1 place-1")
    store.append(row())
    store.close()
    assert opened(path, deployment=known_as).size() == 1


def test_a_foreign_database_is_refused_and_left_alone(path):
    """A database that does not bear our mark, such as a store of the asyncio agent, is not touched."""
    path.parent.mkdir(mode=0o700)
    create_file(path)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LocalStorageError, match="not a store of this agent"):
        BufferStore(path)
    assert path.read_bytes() == before


def test_a_store_of_a_newer_agent_is_refused(path, opened):
    """After a downgrade the newer file is left for the newer agent."""
    store = opened(path)
    store.append(row())
    store._connection.execute(f"PRAGMA user_version={schema.VERSION + 1}")
    store.close()
    with pytest.raises(LocalStorageError, match="newer agent"):
        BufferStore(path)


def test_an_older_store_is_brought_forward(path, opened, monkeypatch):
    """A migration runs once, in order, and the rows come along."""
    store = opened(path)
    store.append(row())
    buffer_id = store.buffer_id
    store.close()
    monkeypatch.setattr(
        schema,
        "MIGRATIONS",
        (*schema.MIGRATIONS, ("CREATE TABLE journal (id INTEGER PRIMARY KEY)",)),
    )
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    for _ in range(2):
        store = opened(path)
        assert (store.size(), store.buffer_id) == (1, buffer_id)
        assert schema.scalar(store._connection, "SELECT count(*) FROM journal") == 0
        store.close()


def test_a_creation_that_was_killed_can_be_completed(path, opened):
    """A file without tables is what a process killed during creation leaves."""
    path.parent.mkdir(mode=0o700)
    create_file(path)
    assert opened(path, create=False).append(row()) == 0


def test_the_file_is_set_up_as_designed(path, opened):
    """WAL, NORMAL, incremental vacuum, our mark and version, the given busy timeout."""
    connection = opened(path, busy_timeout=0.25)._connection
    found = {
        name: connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in (
            "journal_mode",
            "synchronous",
            "auto_vacuum",
            "application_id",
            "user_version",
            "busy_timeout",
        )
    }
    assert found == {
        "journal_mode": "wal",
        "synchronous": 1,
        "auto_vacuum": 2,
        "application_id": schema.APPLICATION_ID,
        "user_version": schema.VERSION,
        "busy_timeout": 250,
    }


# -- trouble


@pytest.fixture
def intruder(path):
    """A second connection to the file, as a backup tool would have."""
    connections = []

    def build():
        connections.append(sqlite3.connect(path, isolation_level=None))
        return connections[-1]

    yield build
    for connection in connections:
        connection.close()


def test_a_locked_file_is_reported_at_once(path, opened, intruder):
    """With ``busy_timeout=0`` every writing call fails fast as busy, counts nothing, and works once the lock is gone."""
    store = opened(path)
    store.append(row())
    other = intruder()
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    for call in (
        lambda: store.append(row()),
        lambda: store.confirm([1]),
        lambda: store.discard([1], "x"),
        lambda: store.claim("c", NOW),
    ):
        with pytest.raises(LocalStorageError, match="locked") as caught:
            call()
        assert classify(caught.value) == BUSY
    assert time.monotonic() - started < 0.5
    assert [entry.id for entry in store.drain(0, 10, 1000, (EVENT,))] == [1]
    assert (store.stats().produced, store.stats().lost) == (1, {})
    other.execute("ROLLBACK")
    assert store.append(row(b"b")) == 0
    assert store.claim("c", NOW) is None
    assert [entry.payload for entry in store.drain(0, 10, 1000, (EVENT,))] == [b"a", b"b"]


def test_tidying_a_locked_file_waits_for_better_times(path, opened, intruder):
    """A reader in the way makes ``vacuum_step`` report that something is left, not fail."""
    store = opened(path)
    store.append(row())
    other = intruder()
    other.execute("BEGIN")
    other.execute("SELECT * FROM entries").fetchall()
    store.append(row())
    assert store.vacuum_step() is False
    other.execute("ROLLBACK")
    assert store.vacuum_step() is True


def test_a_reader_cannot_make_the_log_grow_past_the_cap(path, opened, intruder):
    """While somebody holds the log, ``append`` refuses beyond the cap; afterwards it goes on, and nothing is miscounted."""
    store = opened(path, max_bytes=1024 * 1024)
    store.append(row())
    other = intruder()
    other.execute("BEGIN")
    other.execute("SELECT * FROM entries").fetchall()

    def fill():
        for _ in range(1000):
            store.append(row(bytes(5000)) * 10)

    with pytest.raises(LocalStorageError, match="its log cannot be truncated"):
        fill()
    assert store.stats().bytes < 1024 * 1024 + 200_000
    other.execute("ROLLBACK")
    store.append(row(b"last"))
    stats = store.stats()
    assert stats.bytes <= 1024 * 1024
    assert stats.produced == stats.rows + sum(stats.lost.values())


def test_confirming_keeps_the_byte_cap(path, opened):
    """A full store stays under its cap while it is emptied: the log of a large deletion is moved into the file at once."""
    cap = 1024 * 1024
    store = opened(path, max_bytes=cap)
    while not store.stats().lost:
        store.append(row(bytes(400)) * 100)
    while ids := [entry.id for entry in store.drain(0, 500, cap, (EVENT,))]:
        store.confirm(ids)
        assert store.stats().bytes <= cap


def test_the_byte_cap_holds_from_the_opening_on(path, opened):
    """A dead owner's file and log together may take more than the heir allows; the opening ends below the cap."""
    cap = 1024 * 1024
    store = opened(path, max_bytes=2 * cap)
    store.append(row(bytes(7000)) * 100)
    assert store.stats().bytes > cap
    image = path.with_name("image.sqlite")
    for suffix in ("", "-wal"):
        content = path.with_name(path.name + suffix).read_bytes()
        image.with_name(image.name + suffix).write_bytes(content)
    image.chmod(0o600)
    heir = opened(image, max_bytes=cap)
    assert heir.size() == 100
    assert heir.stats().bytes <= cap


def test_a_full_disk_loses_the_batch_and_nothing_else(path, opened):
    """A transaction that does not fit is taken back whole, told as full, and the store stays usable."""
    store = opened(path)
    store.append(row())
    pages = schema.scalar(store._connection, "PRAGMA page_count")
    store._connection.execute(f"PRAGMA max_page_count={pages + 5}")
    with pytest.raises(LocalStorageError, match="full") as caught:
        store.append(row(bytes(4000)) * 50)
    assert classify(caught.value) == FULL
    assert (store.size(), store.stats().produced) == (1, 1)
    assert store.confirm([1]) == 1
    assert store.append(row(b"b")) == 0
    assert [entry.id for entry in store.drain(0, 10, 1000, (EVENT,))] == [2]


def test_an_exception_in_the_middle_leaves_nothing_half_done(path, opened, monkeypatch):
    """What a host throws into us (a timeout, a kill) takes the transaction back and passes through unchanged."""
    store = opened(path)
    store.append(row())

    class Timeout(BaseException):
        pass

    def thrown(*args):
        raise Timeout

    monkeypatch.setattr(store, "_evict", thrown)
    with pytest.raises(Timeout):
        store.append(row(b"b"))
    monkeypatch.undo()
    assert store.append(row(b"c")) == 0
    assert [entry.payload for entry in store.drain(0, 10, 1000, (EVENT,))] == [b"a", b"c"]
    assert store.stats().produced == store.stats().rows == 2


@pytest.mark.parametrize(
    "garbage", [b"this is not a database at all" * 200, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_corrupt_file_is_reported_and_kept(path, garbage):
    """Garbage is told as corrupt, and stays where it is for whoever moves it aside."""
    path.parent.mkdir(mode=0o700)
    create_file(path)
    path.write_bytes(garbage)
    with pytest.raises(LocalStorageError, match="cannot open the store") as caught:
        BufferStore(path)
    assert classify(caught.value) == CORRUPT
    assert path.read_bytes() == garbage
    with pytest.raises(LocalStorageError, match="cannot open the store"):
        BufferStore(path)


def test_corruption_in_the_middle_is_reported(path, opened):
    """A file damaged behind its header opens, and the call that meets the damage says corrupt."""
    store = opened(path)
    store.append([(EVENT, "", bytes(3000)) for _ in range(200)])
    store.close()
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * (150 * 4096))
    with pytest.raises(LocalStorageError) as caught:
        opened(path).drain(0, 1000, 1 << 30, (EVENT,))
    assert classify(caught.value) == CORRUPT


def test_errors_without_a_known_cause_are_other():
    """The sorting of errors never fails itself."""
    assert classify(LocalStorageError("closed")) == OTHER
    for cause in (sqlite3.ProgrammingError("closed database"), OSError("odd"), ValueError()):
        error = LocalStorageError("x")
        error.__cause__ = cause
        assert classify(error) == OTHER


# -- the end


def test_an_empty_store_leaves_no_file(path, opened):
    """A clean end without rows and without commands deletes everything, the lock file too."""
    store = opened(path)
    store.append(row())
    store.confirm([1])
    store.close()
    assert names(path) == []


def test_rows_survive_a_close(path, opened):
    """What was not delivered is there for the next process, with its counters; the lock file stays with it."""
    store = opened(path, max_rows=2)
    store.append([*row(b"a"), *row(b"b"), *row(b"c")])
    store.discard([3], "rejected")
    store.close()
    assert names(path) == ["store.sqlite", "store.sqlite.lock"]
    again = opened(path, create=False)
    assert [(entry.id, entry.payload) for entry in again.drain(0, 10, 100, (EVENT,))] == [(2, b"b")]
    assert again.buffer_id == store.buffer_id
    assert again.stats().lost == {"capacity": 1, "rejected": 1}
    again.append(row(b"d"))
    assert [entry.id for entry in again.drain(0, 10, 100, (EVENT,))] == [2, 4]


@pytest.mark.parametrize(("age", "kept"), [(0, True), (299, True), (301, False)])
def test_young_commands_survive_a_close(path, opened, age, kept):
    """A command of the last 300 seconds keeps the file, so that a restart does not run it again; an old one does not."""
    store = opened(path)
    store.claim("begun", NOW - age)
    store.settle("ended", b"answer", NOW - age)
    store.close()
    assert path.exists() is kept
    assert lock_path(path).exists() is kept
    if kept:
        again = opened(path, create=False)
        assert again.claim("begun", NOW).state == "started"
        assert again.claim("ended", NOW).result == b"answer"


def test_the_leftover_log_of_a_deleted_store_is_not_replayed(path, opened):
    """A log without its file, left by a deletion that was killed, does not bring old rows into a new store."""
    path.parent.mkdir(mode=0o700)
    store = opened(path)
    store.append(row(b"old"))
    log = path.with_name(path.name + "-wal")
    content = log.read_bytes()
    store.confirm([1])
    store.close()
    log.write_bytes(content)
    assert opened(path).size() == 0


def test_a_large_file_shrinks_when_idle(path, opened):
    """After an outage has been worked off, a bounded number of bounded steps gives the space back."""
    store = opened(path)
    for _ in range(20):
        store.append(row(bytes(1000)) * 500)
    assert store.stats().bytes > 10_000_000
    store.confirm(range(1, 10_001))
    sizes = [store.stats().bytes]
    while not store.vacuum_step():
        sizes.append(store.stats().bytes)
    assert 3 <= len(sizes) <= 20
    assert store.stats().bytes < 512 * 1024
    assert store.append(row()) == 0


def test_results_are_found_without_walking_the_events(path, opened):
    """Asking for results uses the partial index: an outage's worth of events must not delay an answer."""
    store = opened(path)
    for kinds in ((RESULT,), ("projection", RESULT)):
        plan = store._connection.execute(
            "EXPLAIN QUERY PLAN " + schema.select_rows(kinds), (0, 10)
        ).fetchall()
        assert "entries_kept" in str(plan)
        assert "TEMP B-TREE" not in str(plan)


# -- events that came together


def batches(store):
    return schema.scalar(store._connection, "SELECT count(*) FROM batches")


def singles(store):
    return schema.scalar(store._connection, "SELECT count(*) FROM entries")


def test_events_that_came_together_are_one_row(path, opened):
    """An append is one insertion, acks in order loosen nothing, and how far they came is known after a restart."""
    store = opened(path)
    store.append_events([b"%d" % number for number in range(100)])
    store.append_events([b"%d" % number for number in range(100, 150)])
    assert (batches(store), singles(store), store.size()) == (2, 0, 150)
    assert store.confirm(range(1, 71)) == 70
    assert (batches(store), singles(store), store.size()) == (2, 0, 80)
    store.close()
    store = opened(path)
    assert store.size() == 80
    assert store.byte_size() == sum(
        len(entry.payload) for entry in store.drain(0, 1000, 1 << 20, (EVENT,))
    )
    assert [entry.payload for entry in store.drain(0, 2, 1 << 20, (EVENT,))] == [b"70", b"71"]
    assert store.confirm(range(71, 121)) == 50
    assert (batches(store), singles(store), store.size()) == (1, 0, 30)


def test_events_that_part_are_rows_of_their_own(path, opened):
    """What is dropped, doubted or acknowledged out of turn costs its batch no more than its form."""
    store = opened(path)
    store.append_events([b"%d" % number for number in range(10)])
    assert store.confirm([5]) == 1
    assert (batches(store), singles(store)) == (0, 9)
    store.append_events([b"%d" % number for number in range(10, 20)])
    store.increment_attempts([12])
    assert (batches(store), singles(store)) == (0, 19)
    found = store.drain(0, 100, 1 << 20, (EVENT,))
    assert [entry.id for entry in found] == [1, 2, 3, 4, *range(6, 21)]
    assert [entry.id for entry in found if entry.attempts] == [12]


def test_a_batch_is_no_larger_than_a_small_store_bears(path, opened):
    """A batch is evicted as a whole, bytes for bytes; so a small store's are small, and large events stand alone."""
    store = opened(path, max_bytes=1024 * 1024)
    store.append_events([b"x" * 10_000] * 12)
    assert batches(store) >= 6
    assert store.size() == 12
    assert store.append_events([b"y" * 200_000]) == 0
    assert [len(entry.payload) for entry in store.drain(12, 10, 1 << 20, (EVENT,))] == [200_000]


def test_what_a_failed_change_did_is_forgotten(path, opened, monkeypatch):
    """A transaction that is taken back in the middle of an ack leaves batches, figures and cursor as they were."""
    store = opened(path)
    store.append_events([b"%d" % number for number in range(10)])
    monkeypatch.setattr(type(store._accounting.batches), "_adjust", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.confirm(range(1, 5))
    monkeypatch.undo()
    assert store.read_cached(0, 10, 1 << 20, (EVENT,)) is None, "that takes a look at the file"
    assert len(store.drain(0, 100, 1 << 20, (EVENT,))) == store.size() == 10
    assert store.confirm(range(1, 5)) == 4
    assert (store.size(), store.byte_size()) == (6, 6)


def test_a_store_of_the_first_version_is_brought_forward(path, opened):
    """Rows of an agent that knew no batches are read, sent and confirmed beside new ones."""
    path.parent.mkdir(mode=0o700)
    create_file(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in schema.MIGRATIONS[0]:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id={schema.APPLICATION_ID}")
        connection.execute("PRAGMA user_version=1")
        meta = {
            "buffer_id": "b",
            "deployment": "",
            "created_at": 1.0,
            "pid": 1,
            "next_id": 3,
            "confirmed": 1,
        }
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        connection.execute("INSERT INTO entries VALUES (2, 'event', '', X'61', 1.0, 0)")
    assert [row.payload for row in inspect.rows(path)] == [b"a"]
    assert inspect.read_report(path).total == 1
    store = opened(path)
    store.append_events([b"b", b"c"])
    assert [(entry.id, entry.payload) for entry in store.drain(0, 10, 100, (EVENT,))] == [
        (2, b"a"),
        (3, b"b"),
        (4, b"c"),
    ]
    assert [row.payload for row in inspect.rows(path)] == [b"a", b"b", b"c"]
    assert (inspect.read_report(path).rows, inspect.read_report(path).payload_bytes) == (
        {"event": 3},
        3,
    )
    assert store.confirm([2, 3]) == 2
    assert (store.size(), store.stats().produced, store.stats().confirmed) == (1, 4, 3)
