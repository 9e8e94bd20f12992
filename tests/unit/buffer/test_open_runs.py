"""Open runs: what a killed process leaves of them, who reports them, and when."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import z4j_bare
from z4j_bare.buffer import open_runs
from z4j_bare.buffer.adopt_loop import AdoptLoop
from z4j_bare.buffer.files import new_store_path
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.open_runs import (
    SLOTS,
    OpenRuns,
    OrphanRuns,
    orphaned_runs,
    runs_path,
)
from z4j_bare.buffer.recovery import Orphan
from z4j_bare.buffer.report import delete_store
from z4j_bare.buffer.store import BufferStore
from z4j_bare.errors import LocalStorageError
from z4j_bare.interfaces import RUN_FAILED, RUN_REDELIVERED, RUN_RETRIED, RUN_SUCCEEDED

ROOT = Path(z4j_bare.__file__).parents[1]

#: Time of the last flush of the killed process.
FLUSHED = 1_700_000_100.0

#: Keeps runs in every state, writes a line, and waits to be killed.
OWNER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from z4j_bare.buffer.open_runs import OpenRuns
from z4j_bare.interfaces import *
from z4j_bare.buffer import BufferStore, new_store_path
home = Path(sys.argv[1])
ring = SimpleNamespace(produced=0)
runs = OpenRuns(ring, lambda: "p q")
runs.enable()
number = runs.describe("celery", {"task_name": "shop.pay", "queue": "q", "worker": "w@h"})
def start(name, at, flags=0):
    ring.produced += 1
    return runs.start(number, name, at, flags)
def end(slot, outcome, at, note=""):
    ring.produced += 1
    runs.end(slot, outcome, at, note)
flushed = 1_700_000_100.0
early = start("early", flushed - 50)
store = BufferStore(new_store_path(home), deployment="p q")
runs.attach(store.path)
late = start("late", flushed - 40, RUN_REDELIVERED)
end(start("stored", flushed - 30), RUN_SUCCEEDED, flushed - 20)
runs.stored(ring.produced, flushed)
end(start("done", flushed - 10), RUN_SUCCEEDED, flushed + 0.125)
end(start("broken", flushed - 9), RUN_FAILED, flushed + 0.25, "ValueError")
end(start("again", flushed - 8), RUN_RETRIED, flushed + 0.25)
end(start("ignored", flushed - 7), RUN_ENDED, flushed + 0.25)
start("sudden", flushed + 0.5)
store.append([("event", "", b"{}")])
print(store.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def killed(home):
    """The store of a process that was killed when its runs were kept."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home)],
        env=environment,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    path = Path(owner.stdout.readline().decode().strip())
    with pytest.raises(LocalStorageError, match="running process"):
        OrphanRuns(runs_path(path), "p")
    owner.kill()
    owner.wait()
    owner.stdout.close()
    return path


class OwnRuns:
    """The open runs of this process."""

    def __init__(self, home, deployment="p"):
        self.ring = SimpleNamespace(produced=0)
        self.runs = OpenRuns(self.ring, lambda: deployment)
        self.runs.enable()
        self.number = self.runs.describe("celery", {"task_name": "shop.pay"})
        self.path = new_store_path(home)

    def start(self, task_id="t", at=1.0, flags=0):
        self.ring.produced += 1
        return self.runs.start(self.number, task_id, at, flags)

    def end(self, slot, outcome=RUN_SUCCEEDED):
        self.ring.produced += 1
        self.runs.end(slot, outcome, 2.0)

    def die(self):
        """Release the lock as the end of the process would."""
        self.runs._lock.release()


@pytest.fixture
def own(home):
    made = OwnRuns(home)
    yield made
    made.runs._lock and made.die()


def reports(path, deployment="p"):
    orphan = OrphanRuns(path, deployment)
    try:
        return [json.loads(event) for event in orphan.events()]
    finally:
        orphan.release(delete=False)


def test_killed_process_leaves_its_open_runs(killed):
    """Acknowledged early: failure. Late: retry. Ended, not stored: that end. Stored or ended
    without an event: nothing. Times are those of the dead process.
    """
    found = reports(runs_path(killed))
    told = {(event["task_id"], event["kind"]): event for event in found}
    assert list(told) == [
        ("early", "task.failed"),
        ("late", "task.retried"),
        ("done", "task.succeeded"),
        ("broken", "task.failed"),
        ("again", "task.retried"),
        ("sudden", "task.started"),
        ("sudden", "task.failed"),
    ]
    early = told["early", "task.failed"]
    assert early["engine"] == "celery"
    assert early["occurred_at"] == "2023-11-14T22:15:00.000000+00:00"
    assert early["data"] == {
        "task_name": "shop.pay",
        "queue": "q",
        "worker": "w@h",
        "exception": "WorkerLostError",
        "exception_message": "the worker process died while it ran",
    }
    assert told["late", "task.retried"]["occurred_at"] == early["occurred_at"]
    assert "delivers the task again" in told["late", "task.retried"]["data"]["reason"]
    done = told["done", "task.succeeded"]
    assert done["occurred_at"] == "2023-11-14T22:15:00.125000+00:00"
    assert "result" not in done["data"]
    assert told["broken", "task.failed"]["data"]["exception"] == "ValueError"
    sudden = told["sudden", "task.failed"]["occurred_at"]
    assert sudden == "2023-11-14T22:15:00.500000+00:00", "at least the start"
    assert told["sudden", "task.started"]["occurred_at"] == sudden


def test_two_reports_of_a_run_are_equal(killed):
    """The brain recognises the second of two reports by id and time."""
    assert reports(runs_path(killed)) == reports(runs_path(killed), "q")


def test_runs_are_reported_after_all_rows_have_moved(killed, home, backend, until):
    """The rows of the dead process come first, and the files are deleted in the end."""
    opened, counted = [], []

    def open_store():
        opened.append(BufferStore(new_store_path(home), deployment="p"))
        return opened[-1]

    assert orphaned_runs(home) == []
    buffer = BufferManager(open_store, backend)
    stop_event = backend.event()
    loop = AdoptLoop(
        str(home),
        lambda path: Orphan(path, "p", max_rows=1000, max_bytes=1 << 24),
        buffer,
        backend,
        lambda: None,
        lambda path: OrphanRuns(path, "p"),
        on_reported=lambda engine, kind, data: counted.append((engine, kind, data["task_name"])),
    )
    task = backend.spawn(loop.run, stop_event, name="z4j-adopt")
    until(lambda: not runs_path(killed).exists())
    stop_event.set()
    assert task.join(5)
    _, rows = buffer.read_next((0, 0, ()), (0, 100, ("event",)), 1 << 20)
    payloads = [json.loads(row.payload) for row in rows]
    assert payloads[0] == {}
    assert [event["task_id"] for event in payloads[1:3]] == ["early", "late"]
    assert len(payloads) == 8
    assert counted == [
        (each["engine"], each["kind"], each["data"]["task_name"]) for each in payloads[1:]
    ]
    buffer.close()
    assert sorted(path.name for path in home.parent.iterdir() if killed.name in path.name) == []


def test_runs_stay_while_disk_is_failed(killed, home, backend):
    """Reports that would only be in memory are left to the file."""
    delete_rows(killed)

    def open_store():
        raise LocalStorageError("no disk")

    buffer = BufferManager(open_store, backend)
    loop = AdoptLoop(str(home), None, buffer, backend, None, lambda path: OrphanRuns(path, "p"))
    loop._report_runs(loop._claim_runs)
    buffer.append_events([b"{}"])
    assert not buffer.durable
    loop._skip_until.clear()
    loop._report_runs(loop._claim_runs)
    assert runs_path(killed).exists()
    assert len(reports(runs_path(killed))) == 7


def delete_rows(path):
    """Delete a store, but not its runs."""
    for file in path.parent.glob(path.name + "*"):
        if not file.name.endswith(open_runs.SUFFIX):
            file.unlink()


def test_runs_of_another_deployment_stay(killed):
    """Another project's runs must not reach this brain."""
    with pytest.raises(LocalStorageError, match="another deployment"):
        OrphanRuns(runs_path(killed), "another")
    assert len(reports(runs_path(killed), "q")) == 7


def test_deleted_store_takes_its_runs_along(killed):
    """``buffer drop`` leaves nothing to report."""
    delete_store(killed)
    assert not runs_path(killed).exists()


def test_file_is_deleted_when_nothing_is_open(own):
    """A stop without open runs leaves no file."""
    own.runs.attach(own.path)
    own.end(own.start())
    own.runs.stored(own.ring.produced, 3.0)
    own.runs.close()
    assert not runs_path(own.path).exists()


@pytest.mark.parametrize("ended", [True, False])
def test_open_run_keeps_file_after_close(own, ended):
    """After a stop the file stays locked until the process ends; the next agent reports the run."""
    own.runs.attach(own.path)
    slot = own.start()
    if ended:
        own.end(slot)
    own.runs.close()
    with pytest.raises(LocalStorageError):
        OrphanRuns(runs_path(own.path), "p")
    own.die()
    kind = "task.succeeded" if ended else "task.failed"
    assert [event["kind"] for event in reports(runs_path(own.path))][-1] == kind


def test_slots_are_used_again_when_their_ends_are_stored(own):
    """A slot of an ended run is free when the event of its end is stored, and not before."""
    first = own.start()
    own.end(first)
    own.runs.stored(own.ring.produced - 1, 3.0)
    assert own.start() != first
    own.runs.stored(own.ring.produced, 4.0)
    assert own.start() == first


def test_run_without_slot_is_counted(own):
    """With all slots in use a run is counted and not kept. The same holds for an id that does not
    fit.
    """
    for _ in range(SLOTS):
        assert own.start()
    assert own.start() == 0
    assert own.runs.not_kept == 1
    own.runs.end(0, RUN_SUCCEEDED, 2.0)
    own.runs.stored(own.ring.produced, 3.0)
    for task_id in ("x" * 225, "\ud800", None):
        assert own.start(task_id) == 0
    assert own.runs.not_kept == 4


def test_free_slot_that_another_thread_takes_is_replaced(own):
    """If another thread takes the last free slot first, the run gets an unused slot."""

    class LastSlotTaken(list):
        def __len__(self):
            return 1  # as before the other thread took the slot

    own.runs._free = LastSlotTaken()
    assert own.start()
    assert own.runs.not_kept == 0


def test_description_that_does_not_fit_keeps_no_run(own):
    """A description of a long name, or one too many, has the number -1."""
    assert own.runs.describe("celery", {"task_name": "x" * 600}) == -1
    assert own.runs.start(-1, "t", 1.0, 0) == 0
    for _ in range(open_runs.DESCRIPTIONS):
        last = own.runs.describe("celery", {})
    assert last == -1


def test_runs_move_to_file_of_next_store(own, home):
    """Runs from before the first store, and from before its replacement, are in the last file."""
    own.start("before")
    own.runs.attach(own.path)
    own.start("between", flags=RUN_REDELIVERED)
    second = new_store_path(home)
    own.runs.attach(second)
    own.end(own.start("after"))
    assert not runs_path(own.path).exists()
    own.die()
    kinds = {event["task_id"]: event["kind"] for event in reports(runs_path(second))}
    assert kinds == {
        "before": "task.failed",
        "between": "task.retried",
        "after": "task.succeeded",
    }


def test_runs_stay_in_memory_without_a_file(own, tmp_path):
    """A file that cannot be made costs the reports, not the host."""
    own.runs.attach(tmp_path / "missing" / "store.sqlite")
    assert own.start()
    own.runs.close()


def test_unwritten_file_is_empty(home):
    """A process that was killed while it made the file had no runs in it."""
    path = runs_path(new_store_path(home))
    path.touch(0o600)
    orphan = OrphanRuns(path, "p")
    assert orphan.events() == []
    orphan.release(delete=True)
    assert not path.exists()


@pytest.mark.parametrize("noise", [b"\xff", b"\x80\x00"])
def test_file_with_damaged_header_is_refused(own, home, noise):
    """A file whose deployment is not readable counts as that of another deployment."""
    own.runs.attach(own.path)
    content = bytearray(runs_path(own.path).read_bytes())
    content[len(open_runs.MAGIC) :] = (noise * len(content))[: len(content) - len(open_runs.MAGIC)]
    damaged = runs_path(home.parent / "z4j-green-damaged.sqlite")
    damaged.write_bytes(content)
    damaged.chmod(0o600)
    with pytest.raises(LocalStorageError, match="deployment"):
        OrphanRuns(damaged, "p")


def test_file_is_private_and_without_holes(own):
    """Other users cannot read it, and a full disk cannot kill the process at a later write."""
    own.runs.attach(own.path)
    found = runs_path(own.path).stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_blocks * 512 >= found.st_size == open_runs.FILE_BYTES


def test_agent_without_runs_makes_no_file(home):
    """Only an engine that keeps runs enables them."""
    runs = OpenRuns(SimpleNamespace(produced=0), str)
    path = new_store_path(home)
    runs.attach(path)
    runs.stored(1, 1.0)
    runs.close()
    assert not runs_path(path).exists()


def test_failed_and_retried_ends_have_a_text():
    """The text of an error is in the ring only; the report says so."""
    for outcome in (RUN_FAILED, RUN_RETRIED):
        assert open_runs.END_NOT_REPORTED in open_runs._END[outcome][1].values()
