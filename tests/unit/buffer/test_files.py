"""The file of a store: access, ownership, errors, deletion, migration and batches."""

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
from z4j_bare.buffer.store import ENOUGH_SPACE
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


# -- directories


def test_store_path_uses_only_directory_of_setting(tmp_path):
    """The file name has the pid and is new each time, so that the asyncio agent's stores stay."""
    configured = tmp_path / "deep" / "er" / "buffer-123.sqlite"
    first, second = new_store_path(configured), new_store_path(str(configured))
    assert first != second
    assert first.parent == second.parent == configured.parent
    assert first.name.startswith(f"z4j-green-{os.getpid()}-")
    assert not configured.exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_directory_and_files_are_private(tmp_path, opened, umask):
    """Directories have mode 0700 and files 0600, with log, index and lock, under any umask."""
    before = os.umask(umask)
    try:
        store = opened(new_store_path(tmp_path / "a" / "b" / "buffer-1.sqlite"))
        store.append(row())
    finally:
        os.umask(before)
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]
    assert len(names(store.path)) == 4
    assert {mode(store.path.parent / name) for name in names(store.path)} == {0o600}


def test_home_directory_is_expanded(monkeypatch, tmp_path):
    """``~`` is the home directory of the user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_store_path("~/.z4j/buffer-1.sqlite").parent == tmp_path / ".z4j"


def test_directory_writable_by_others_is_refused(path):
    """The message has the directory, its mode, the uid and the setting to change."""
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


def test_directory_readable_by_others_is_accepted(path, opened):
    """Other users may see the names, because the files have mode 0600."""
    path.parent.mkdir()
    path.parent.chmod(0o755)
    assert opened(path).append(row()) == 0


def test_linked_directory_is_refused(tmp_path, path):
    """The target of a symbolic link may change."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    path.parent.symlink_to(real)
    with pytest.raises(LocalStorageError, match=r"symbolic link.*Z4J_HOME"):
        new_store_path(path)


def test_directory_of_other_user_is_refused(path, monkeypatch):
    """Its owner could replace the file."""
    path.parent.mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(
        LocalStorageError, match=rf"belongs to uid {me}; this process runs as uid {me + 1}"
    ):
        new_store_path(path)


def test_file_instead_of_directory_is_refused(path):
    """A regular file is not a directory, and nothing can be created below it."""
    path.parent.write_bytes(b"")
    with pytest.raises(LocalStorageError, match="not a directory"):
        new_store_path(path)
    with pytest.raises(LocalStorageError, match="cannot create"):
        new_store_path(path / "below" / "buffer-1.sqlite")


def test_read_only_directory_is_reported(path, monkeypatch):
    """The error contains the name of the file and the setting, and has its own cause."""
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
def test_directory_without_write_permission_is_reported(path):
    """The same with real permissions, for every user but root."""
    path.parent.mkdir(mode=0o500)
    with pytest.raises(LocalStorageError, match="Z4J_HOME"):
        BufferStore(path)


def test_create_file_never_replaces(path):
    """It follows no link and takes no existing name."""
    path.parent.mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(FileExistsError):
        create_file(path)
    with pytest.raises(LocalStorageError, match="not a regular file"):
        BufferStore(path)
    assert path.is_symlink()
    assert not (path.parent / "elsewhere").exists()


def test_file_readable_by_others_is_refused(path, opened):
    """A store whose mode was widened may have been read or changed."""
    store = opened(path)
    store.append(row())
    store.close()
    path.chmod(0o640)
    with pytest.raises(LocalStorageError, match=r"accessible to others \(mode 0640\)"):
        BufferStore(path)


def test_open_without_create_needs_existing_file(path):
    """``create=False`` creates neither a file nor a lock file."""
    with pytest.raises(LocalStorageError, match="cannot open the store"):
        BufferStore(path, create=False)
    assert names(path) == []


# -- ownership


def test_second_opener_in_process_is_refused(path, opened):
    """A record lock does not exclude its own process, but the table of locks does."""
    store = opened(path)
    with pytest.raises(LocalStorageError, match="open in this process"):
        BufferStore(path)
    linked = path.parent.parent / "link"
    linked.symlink_to(path.parent)
    with pytest.raises(LocalStorageError, match="symbolic link"):
        BufferStore(linked / path.name)
    store.append(row())
    assert store.size() == 1


def test_lock_on_deleted_file_is_refused(path, monkeypatch):
    """An owner may delete its store after another process opened the lock file."""
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


def test_store_of_other_deployment_is_refused(path, opened):
    """Rows never reach another project's brain, and the message does not contain the deployment."""
    store = opened(path, deployment="project-a")
    store.append(row())
    store.close()
    with pytest.raises(LocalStorageError, match="another deployment") as caught:
        BufferStore(path, deployment="project-b")
    assert "project-a" not in str(caught.value)
    assert opened(path, deployment="project-a").size() == 1


@pytest.mark.parametrize("known_as", ["key-2 place-1", "key-1 place-2"])
def test_one_common_name_makes_same_deployment(path, opened, known_as):
    """After a key rotation or a move of the brain, a project's rows are still its own."""
    store = opened(path, deployment="key-1 place-1")
    store.append(row())
    store.close()
    assert opened(path, deployment=known_as).size() == 1


def test_foreign_database_is_refused_unchanged(path):
    """A database without the application id, such as the asyncio agent's, stays as it is."""
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


def test_store_of_newer_agent_is_refused(path, opened):
    """After a downgrade, the newer file is left for the newer agent."""
    store = opened(path)
    store.append(row())
    store._connection.execute(f"PRAGMA user_version={schema.VERSION + 1}")
    store.close()
    with pytest.raises(LocalStorageError, match="newer agent"):
        BufferStore(path)


def test_older_store_is_migrated(path, opened, monkeypatch):
    """A migration runs once and in order, and the rows are kept."""
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


def test_interrupted_creation_is_completed(path, opened):
    """A process killed during creation leaves a file without tables."""
    path.parent.mkdir(mode=0o700)
    create_file(path)
    assert opened(path, create=False).append(row()) == 0


def test_pragmas_are_set(path, opened):
    """WAL, NORMAL, incremental vacuum, application id and version, the given busy timeout."""
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


# -- errors


@pytest.fixture
def other_connection(path):
    """A second connection to the file, like that of a backup tool."""
    connections = []

    def build():
        connections.append(sqlite3.connect(path, isolation_level=None))
        return connections[-1]

    yield build
    for connection in connections:
        connection.close()


def test_locked_file_fails_fast(path, opened, other_connection):
    """With ``busy_timeout=0``, writing calls fail as busy, count nothing and later succeed."""
    store = opened(path)
    store.append(row())
    other = other_connection()
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


def test_vacuum_of_locked_file_is_incomplete(path, opened, other_connection):
    """A reader makes ``vacuum_step`` report remaining work instead of an error."""
    store = opened(path)
    store.append(row())
    other = other_connection()
    other.execute("BEGIN")
    other.execute("SELECT * FROM entries").fetchall()
    store.append(row())
    assert store.vacuum_step() is False
    other.execute("ROLLBACK")
    assert store.vacuum_step() is True


def test_reader_cannot_grow_log_past_cap(path, opened, other_connection):
    """While another process reads the log, ``append`` raises above the cap, and later succeeds."""
    store = opened(path, max_bytes=1024 * 1024)
    store.append(row())
    other = other_connection()
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


def test_confirm_stays_within_byte_cap(path, opened):
    """The log of a large delete is moved into the file at once."""
    cap = 1024 * 1024
    store = opened(path, max_bytes=cap)
    while not store.stats().lost:
        store.append(row(bytes(400)) * 100)
    while ids := [entry.id for entry in store.drain(0, 500, cap, (EVENT,))]:
        store.confirm(ids)
        assert store.stats().bytes <= cap


def test_open_reduces_size_to_byte_cap(path, opened):
    """The file and log of a dead owner may exceed the cap; after the open they do not."""
    cap = 1024 * 1024
    store = opened(path, max_bytes=2 * cap)
    store.append(row(bytes(7000)) * 100)
    assert store.stats().bytes > cap
    image = path.with_name("image.sqlite")
    for suffix in ("", "-wal"):
        content = path.with_name(path.name + suffix).read_bytes()
        image.with_name(image.name + suffix).write_bytes(content)
    image.chmod(0o600)
    target = opened(image, max_bytes=cap)
    assert target.size() == 100
    assert target.stats().bytes <= cap


def test_full_disk_rolls_back_append(path, opened):
    """A transaction that does not fit is rolled back as full, and the store stays usable."""
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


def test_full_disk_evicts_events_only_if_files_cannot_shrink(path, opened):
    """The files first shrink by the space of acknowledged rows; events are dropped last."""
    store = opened(path)
    store.append(row(bytes(4000)) * 300)
    store.confirm(list(range(1, 291)))
    size = store.stats().bytes
    assert store.free_space() == 0
    assert (store.size(), store.stats().lost) == (10, {})
    assert store.stats().bytes < size - ENOUGH_SPACE
    assert store.free_space() == 10
    assert store.stats().lost == {"capacity": 10}


def test_exception_rolls_back_transaction(path, opened, monkeypatch):
    """A timeout or kill thrown by the host rolls back the transaction and is raised unchanged."""
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
def test_corrupt_file_is_reported_and_kept(path, garbage):
    """Random bytes are reported as corrupt, and the file stays for the quarantine."""
    path.parent.mkdir(mode=0o700)
    create_file(path)
    path.write_bytes(garbage)
    with pytest.raises(LocalStorageError, match="cannot open the store") as caught:
        BufferStore(path)
    assert classify(caught.value) == CORRUPT
    assert path.read_bytes() == garbage
    with pytest.raises(LocalStorageError, match="cannot open the store"):
        BufferStore(path)


def test_corruption_behind_header_is_reported(path, opened):
    """The damaged file opens, and the call that reads the damage reports corrupt."""
    store = opened(path)
    store.append([(EVENT, "", bytes(3000)) for _ in range(200)])
    store.close()
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * (150 * 4096))
    with pytest.raises(LocalStorageError) as caught:
        opened(path).drain(0, 1000, 1 << 30, (EVENT,))
    assert classify(caught.value) == CORRUPT


def test_unknown_errors_are_classified_as_other():
    """The classification of errors never fails."""
    assert classify(LocalStorageError("closed")) == OTHER
    for cause in (sqlite3.ProgrammingError("closed database"), OSError("odd"), ValueError()):
        error = LocalStorageError("x")
        error.__cause__ = cause
        assert classify(error) == OTHER


# -- close


def test_close_deletes_empty_store(path, opened):
    """A clean close without rows and commands deletes all files, including the lock file."""
    store = opened(path)
    store.append(row())
    store.confirm([1])
    store.close()
    assert names(path) == []


def test_rows_survive_close(path, opened):
    """Undelivered rows and the counters are there for the next process, and the lock file stays."""
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
def test_recent_commands_survive_close(path, opened, age, kept):
    """A command of the last 300 s keeps the file, so that it is not run again."""
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


def test_log_of_deleted_store_is_not_replayed(path, opened):
    """A log left by an interrupted deletion does not restore old rows in a new store."""
    path.parent.mkdir(mode=0o700)
    store = opened(path)
    store.append(row(b"old"))
    log = path.with_name(path.name + "-wal")
    content = log.read_bytes()
    store.confirm([1])
    store.close()
    log.write_bytes(content)
    assert opened(path).size() == 0


def test_large_file_shrinks_when_idle(path, opened):
    """After an outage, a limited number of limited steps returns the space."""
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


def test_results_are_found_by_partial_index(path, opened):
    """A query for results does not scan the events of an outage."""
    store = opened(path)
    for kinds in ((RESULT,), ("projection", RESULT)):
        plan = store._connection.execute(
            "EXPLAIN QUERY PLAN " + schema.select_rows(kinds), (0, 10)
        ).fetchall()
        assert "entries_kept" in str(plan)
        assert "TEMP B-TREE" not in str(plan)


# -- batches


def batches(store):
    return schema.scalar(store._connection, "SELECT count(*) FROM batches")


def singles(store):
    return schema.scalar(store._connection, "SELECT count(*) FROM entries")


def test_appended_events_are_one_row(path, opened):
    """An append is one insertion, acks in order split nothing and survive a restart."""
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


def test_batch_is_split_for_single_events(path, opened):
    """A discard, an attempt or an ack out of order splits the batch and loses no event."""
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


def test_batches_of_small_store_are_small(path, opened):
    """A batch is evicted as a whole, so a small store has small batches and single large events."""
    store = opened(path, max_bytes=1024 * 1024)
    store.append_events([b"x" * 10_000] * 12)
    assert batches(store) >= 6
    assert store.size() == 12
    assert store.append_events([b"y" * 200_000]) == 0
    assert [len(entry.payload) for entry in store.drain(12, 10, 1 << 20, (EVENT,))] == [200_000]


def test_rolled_back_ack_restores_batches(path, opened, monkeypatch):
    """A rollback during an ack leaves batches, counters and cursor as they were."""
    store = opened(path)
    store.append_events([b"%d" % number for number in range(10)])
    monkeypatch.setattr(type(store._accounting.batches), "_adjust", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.confirm(range(1, 5))
    monkeypatch.undo()
    assert store.read_cached(0, 10, 1 << 20, (EVENT,)) is None, "this needs the file"
    assert len(store.drain(0, 100, 1 << 20, (EVENT,))) == store.size() == 10
    assert store.confirm(range(1, 5)) == 4
    assert (store.size(), store.byte_size()) == (6, 6)


def test_store_of_schema_1_is_migrated(path, opened):
    """Rows of schema 1, which has no batches, are read and confirmed beside new ones."""
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
