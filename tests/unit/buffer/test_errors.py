"""The manager with real disk errors: full, truncated, deleted; callers see no exception."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import z4j_bare
from z4j_bare.buffer import BufferStore, files, new_store_path
from z4j_bare.buffer import files as paths
from z4j_bare.buffer import opener as opening
from z4j_bare.buffer.errors import OTHER, classify
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.opener import open_store
from z4j_bare.buffer.rows import KINDS
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import LocalStorageError

ROOT = Path(z4j_bare.__file__).parent.parent
ALL = tuple(KINDS)

#: Fills a store under a file size limit, prints the stats, then lifts the limit.
FULL = """
import json, logging, resource, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
from z4j_bare.buffer import BufferStore, new_store_path
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.concurrency.fake import FakeConcurrency
backend, (_, hard) = FakeConcurrency(), resource.getrlimit(resource.RLIMIT_FSIZE)
stores = []
def open_store():
    stores.append(BufferStore(new_store_path(sys.argv[1])))
    return stores[-1]
manager = BufferManager(open_store, backend)
manager.append([("result", "c", b"precious")])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
produced = 1
durable = []
for turn in range(60):
    manager.append([("event", "t", bytes(1000)) for _ in range(100)])
    produced += 100
    backend.advance(1)
    durable.append(manager.durable)
def totals():
    stats = manager.stats()
    return {
        "produced": produced,
        "rows": stats.rows,
        "lost": sum(stats.lost.values()),
        "results_lost": stats.lost_kinds.get("result", 0),
    }
during = totals()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
backend.advance(400)
manager.append([("event", "t", b"after")])
produced += 1
after = totals()
check = stores[-1]._connection.execute("PRAGMA integrity_check").fetchone()[0]
newest = [row.payload == b"after" for row in stores[-1].drain(0, 10**6, 1 << 40, ("event",))]
print(json.dumps({
    "during": during,
    "after": after,
    "durable": durable,
    "at_the_end": manager.durable,
    "check": check,
    "newest": any(newest),
}))
"""


class RealStoreHarness:
    """A manager on real stores in virtual time."""

    def __init__(self, home, **options):
        self.backend = FakeConcurrency()
        self.home = home
        self.options = {"busy_timeout": 0, **options}
        self.stores = []
        self.buffer = BufferManager(self.open, self.backend)
        self.produced = 0

    def open(self):
        self.stores.append(open_store(self.home, **self.options))
        return self.stores[-1]

    def append_numbers(self, number=10, size=0):
        self.buffer.append(
            [("event", "t", b"%d" % (self.produced + n) + bytes(size)) for n in range(number)]
        )
        self.produced += number

    def read_numbers(self):
        found = self.buffer.read_next((0, 0, ()), (0, 10**6, ALL), 1 << 40)[1]
        return [int(row.payload.rstrip(b"\0")) for row in found]

    def is_balanced(self):
        stats = self.buffer.stats()
        return self.produced == stats.rows + sum(stats.lost.values()) + stats.confirmed


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The configured path; the alternative directories belong to this test."""
    spare = tmp_path / "tmp"
    spare.mkdir()
    monkeypatch.setattr(
        paths, "candidate_directories", lambda path: [Path(path).parent, spare / "z4j-1"]
    )
    return tmp_path / "home" / "buffer.sqlite"


@pytest.fixture
def harness(home):
    one = RealStoreHarness(home)
    yield one
    one.buffer.close()


# -- full


@pytest.mark.parametrize("limit", [200_000, 1_500_000])
def test_file_size_limit_evicts_oldest_events(tmp_path, limit):
    """Under RLIMIT_FSIZE, events are evicted or memory is used; every row is accounted for."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", FULL, str(tmp_path / "home" / "b"), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for totals in (said["during"], said["after"]):
        assert totals["produced"] == totals["rows"] + totals["lost"]
        assert totals["results_lost"] == 0
    assert said["check"] == "ok"
    assert said["at_the_end"]
    assert said["newest"]
    assert "disk is full" in done.stderr or "in memory only" in done.stderr
    assert len(done.stderr.splitlines()) <= 6, "the log is not filled"


# -- corrupt, truncated, deleted


@pytest.mark.parametrize("how", ["cut to a page and a half", "cut to nothing", "overwritten"])
def test_damaged_file_is_replaced_during_use(harness, how):
    """Whatever happens to the file, appends succeed on disk, and every row is accounted for."""
    for _ in range(30):
        harness.append_numbers(100, size=500)
    path = harness.stores[0].path
    harness.stores[0]._space._checkpoint()
    size = path.stat().st_size
    if how == "overwritten":
        with path.open("r+b") as file:
            for page in range(0, size, 4096):
                file.seek(page + 100)
                file.write(os.urandom(3000))
    else:
        os.truncate(path, 6000 if "page" in how else 0)
    harness.stores[0]._connection.execute("PRAGMA shrink_memory")
    for _ in range(3):
        harness.append_numbers(100, size=500)
        harness.read_numbers()
        harness.backend.advance(1)
    assert harness.buffer.durable
    assert harness.read_numbers()[-1] == harness.produced - 1
    assert harness.is_balanced()
    aside = [found.name for found in path.parent.iterdir() if ".corrupt-" in found.name]
    assert (
        len([name for name in aside if not name.endswith("-wal")]) == len(harness.stores) - 1 == 1
    )


def test_deleted_file_is_replaced_with_next_stats(harness):
    """When the file is deleted, its rows are moved to a new one as soon as the stats are read."""
    harness.append_numbers(10)
    for found in list(harness.home.parent.iterdir()):
        found.unlink()
    harness.backend.advance(2)
    assert harness.read_numbers() == list(range(10))
    harness.append_numbers(5)
    assert harness.stores[-1].path.exists()
    assert len(harness.stores) == 2
    assert harness.read_numbers() == list(range(15))
    assert harness.is_balanced()


def test_deleted_directory_is_created_again(harness):
    """The whole directory Z4J_HOME may be deleted."""
    harness.append_numbers(10)
    for found in list(harness.home.parent.iterdir()):
        found.unlink()
    harness.home.parent.rmdir()
    harness.backend.advance(2)
    assert harness.read_numbers() == list(range(10))
    assert harness.buffer.durable
    assert harness.stores[-1].path.exists()


# -- other directories


def damage(home, how):
    directory = home.parent
    if how == "a link":
        (directory.parent / "other").mkdir(mode=0o700)
        directory.symlink_to(directory.parent / "other")
    elif how == "a file":
        directory.touch()
    elif how == "writable by others":
        directory.mkdir()
        directory.chmod(0o777)
    elif how == "somebody else's":
        directory.mkdir(mode=0o700)
        os.chown(directory, 12345, 12345)


@pytest.mark.parametrize(
    "how",
    [
        "a link",
        "a file",
        "writable by others",
        pytest.param(
            "somebody else's",
            marks=pytest.mark.skipif(
                os.geteuid() != 0, reason="only root may give a directory away"
            ),
        ),
    ],
)
def test_unusable_directory_is_replaced(home, harness, caplog, how):
    """The store is in a temporary directory, and one warning gives reason and setting."""
    damage(home, how)
    harness.append_numbers(3)
    harness.append_numbers(3)
    assert harness.stores[0].path.parent.name == "z4j-1"
    assert harness.buffer.durable
    assert harness.read_numbers() == list(range(6))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "Z4J_HOME" in warnings[0]
    assert "z4j-1" in warnings[0]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_read_only_directory_is_replaced(home, harness, monkeypatch, number):
    """A directory without write access is skipped."""
    really = files.open_file
    home.parent.mkdir(mode=0o700)

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(home.parent)):
            raise OSError(number, os.strerror(number))
        return really(path, *args, **kwargs)

    monkeypatch.setattr(files, "open_file", refuse)
    harness.append_numbers(3)
    assert harness.stores[0].path.parent.name == "z4j-1"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_record_locks_is_skipped(home, monkeypatch, number):
    """Without record locks, a dead owner could not be distinguished from a running one."""

    def refuse(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(LocalStorageError, match=r"no record locks.*Z4J_HOME") as caught:
        open_store(home)
    assert classify(caught.value) == OTHER


def test_occupied_directory_name_is_not_used(home, tmp_path):
    """When another user occupies the predictable name, a random one is used."""
    damage(home, "writable by others")
    (tmp_path / "tmp" / "z4j-1").symlink_to(tmp_path)
    store = open_store(home)
    assert store.path.parent.name.startswith("z4j-1-")
    assert paths.is_private(store.path.parent)
    store.close()


def test_full_disk_does_not_change_directory(home, monkeypatch):
    """The error of the configured directory is raised; another directory would not help."""

    def refuse(path, **_options):
        raise LocalStorageError("full") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(opening, "BufferStore", refuse)
    with pytest.raises(LocalStorageError, match=r"^full$"):
        open_store(home)


def test_memory_is_used_without_usable_directory(home, tmp_path, harness, caplog):
    """No error is raised, rows are in memory, and the warning names the directory."""
    damage(home, "a file")
    (tmp_path / "tmp").rmdir()
    (tmp_path / "tmp").touch()
    harness.append_numbers(3)
    assert not harness.buffer.durable
    assert harness.read_numbers() == [0, 1, 2]
    assert str(home.parent) in caplog.text
    assert harness.is_balanced()


def test_candidate_directories_include_temporary_ones(tmp_path, monkeypatch):
    """TMPDIR is used, and the names contain the user id."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    found = paths.candidate_directories(tmp_path / "home" / "b.sqlite")
    assert found[:2] == [tmp_path / "home", tmp_path / "t" / f"z4j-{os.geteuid()}"]


# -- time


def test_clock_set_back_gives_no_negative_age(home):
    """A row with a future timestamp has the age zero."""
    now = [2000.0]
    store = BufferStore(new_store_path(home), clock=lambda: now[0])
    store.append([("event", "", b"1")])
    now[0] = 1000.0
    assert store.stats().oldest_age == 0
    store.claim("c", 2000.0)
    assert [entry.key for entry in store.export_state().ledger] == ["c"]
    store.close()
