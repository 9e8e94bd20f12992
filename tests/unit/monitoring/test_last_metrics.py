"""The metrics that a process writes when its agent stops."""

import logging
import os
from pathlib import Path

import pytest

from z4j_bare.events.task_counts import TaskCounts
from z4j_bare.monitoring import last_metrics
from z4j_bare.monitoring.last_metrics import KEEP_SECONDS, LastMetrics, read_last

ANSWER = '{"pid": 7}'


@pytest.fixture
def home():
    """The ``Z4J_HOME`` of this test, which exists."""
    path = Path(os.environ["Z4J_HOME"])
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@pytest.fixture
def write(backend):
    """``write(answer, adapter)``: write an answer as the last metrics of this process."""

    def run(answer, adapter="bare", *, has_tasks=True):
        counts = TaskCounts()
        if has_tasks:
            counts._names.add("shop.pay")
        LastMetrics(adapter, {"metrics": lambda: answer}, counts, backend).write()

    return run


def test_last_answer_is_read_by_other_process(home, write):
    """The file has the answer, the adapter's name as clients use it, and the time of the end."""
    write(iter(['{"pid": 7, "tasks": [', '{"name": "ü\\ud800"}', "]}"]), adapter="my.app")
    (path,) = home.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    ((at, answer),) = read_last(home, path.stat().st_mtime)
    assert at == pytest.approx(path.stat().st_mtime, abs=5)
    assert answer == {"adapter": "my_app", "pid": 7, "tasks": [{"name": "ü\ud800"}]}


def test_old_and_unfinished_files_are_removed(home, write):
    """The next reader and the next ending process remove old and unfinished files."""
    write(iter([ANSWER]))
    unfinished = home / "metrics-ended-1-abc.tmp"
    unfinished.write_text("{")
    (path,) = home.glob("*.json")
    later = path.stat().st_mtime + KEEP_SECONDS
    assert len(list(read_last(home, later - 1))) == 1
    list(read_last(home, later + 1))
    assert list(home.iterdir()) == []
    for old in (path, unfinished):
        old.write_text("{}")
        os.utime(old, (1.0, 1.0))
    write(iter([ANSWER]))
    (left,) = home.iterdir()
    assert left != path


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 9}', '{"schema": 1, "at": "x"}'])
def test_damaged_file_is_ignored(home, content):
    """A file that another version or an interrupted process wrote yields no answer."""
    (home / "metrics-ended-1-abc.json").write_text(content)
    assert list(read_last(home, 0.0)) == []


def test_process_without_tasks_and_refused_answer_leave_no_file(home, write):
    """A process that ran no task, or that has ``Z4J_INSPECT=0``, writes nothing."""
    write(iter([ANSWER]), has_tasks=False)
    write({"error": "Z4J_INSPECT=0 forbids this request"})
    assert list(home.iterdir()) == []


def test_failure_is_logged_and_does_not_stop_the_host(write, caplog, monkeypatch):
    """An error while the answer is collected or written is logged in one line and not raised."""
    caplog.set_level(logging.INFO)

    def fail():
        yield "{"
        raise RuntimeError("broken")

    write(fail())

    def refuse(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(last_metrics, "ensure_home", refuse)
    write(iter([ANSWER]))
    texts = [record.getMessage() for record in caplog.records if "last metrics" in record.msg]
    assert len(texts) == 2
    assert "Permission denied" in texts[1]
    assert "broken: `z4j-bare metrics` shows those of its last request" in texts[0]
