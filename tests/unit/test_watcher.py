"""The watcher of ``tasks.py`` files, in every mode."""

import pytest

from z4j_bare import watcher
from z4j_bare.watcher import TasksFileWatcher


@pytest.fixture(autouse=True)
def looked(monkeypatch, until):
    """``looked()``: wait for two more looks, after which what there was is known; looks come quickly here."""
    looks, look = [], watcher._scan
    monkeypatch.setattr(watcher, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(watcher, "_scan", lambda *args: looks.append(1) or look(*args))

    def wait():
        before = len(looks)
        until(lambda: len(looks) > before + 1)

    return wait


@pytest.fixture
def watch(backend):
    """``watch(*paths)``: a started watcher, and the list of what it has told."""
    started = []

    def start(*paths, **how):
        told = []
        made = TasksFileWatcher(app_paths=paths, on_change=told.append, debounce_ms=50, **how)
        assert made.start() is True
        assert made.start() is True
        started.append(made)
        return told

    yield start
    for made in started:
        made.stop()
        made.stop()


def test_changes_are_told(watch, tmp_path, until, looked):
    """A file of that name that is changed, made or removed anywhere below is told once; others are not."""
    old, new = tmp_path / "shop" / "tasks.py", tmp_path / "shop" / "deep" / "tasks.py"
    new.parent.mkdir(parents=True)
    (tmp_path / "__pycache__").mkdir()
    old.write_text("x = 1")
    told = watch(tmp_path)
    looked()
    (tmp_path / "views.py").write_text("")
    (tmp_path / "__pycache__" / "tasks.py").write_text("")
    new.write_text("y = 1")
    until(lambda: told == [new])
    old.write_text("x = 1000")
    until(lambda: told == [new, old])
    new.unlink()
    until(lambda: told == [new, old, new])


def test_a_file_that_is_still_written(watch, tmp_path, until, backend, looked):
    """What changes on and on is told when it is quiet."""
    path = tmp_path / "tasks.py"
    told = watch(tmp_path)
    looked()
    for size in range(1, 21):
        path.write_text("x" * size)
        backend.sleep(0.02)
    until(lambda: told)
    assert len(told) < 20  # one, but for a machine that stalls between two of the writes


def test_other_names(watch, tmp_path, until, looked):
    """The names to watch can be chosen."""
    told = watch(tmp_path, filenames={"jobs.py"})
    looked()
    (tmp_path / "tasks.py").write_text("")
    (tmp_path / "jobs.py").write_text("")
    until(lambda: told == [tmp_path / "jobs.py"])


def test_a_callback_that_fails(tmp_path, until, looked, caplog):
    """An error of the callback's is logged, and the next change is told."""
    told = []

    def fail(path):
        told.append(path)
        raise ValueError("no")

    made = TasksFileWatcher(app_paths=[tmp_path], on_change=fail, debounce_ms=0)
    made.start()
    looked()
    for size in (1, 2):
        (tmp_path / "tasks.py").write_text("x" * size)
        until(lambda size=size: len(told) == size)
        looked()
    made.stop()
    assert "failed with ValueError" in caplog.text


def test_nothing_to_watch(tmp_path):
    """Without a directory there is nothing to start, and stopping that is no error."""
    made = TasksFileWatcher(app_paths=[tmp_path / "gone"], on_change=print)
    assert made.start() is False
    made.stop()
