"""The watcher of ``tasks.py`` files, in every mode."""

import pytest

from z4j_bare import watcher
from z4j_bare.watcher import TasksFileWatcher


@pytest.fixture(autouse=True)
def scanned(monkeypatch, until):
    """``scanned()``: wait for two more scans, after which the current files are known."""
    scans, scan = [], watcher._scan
    monkeypatch.setattr(watcher, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(watcher, "_scan", lambda *args: scans.append(1) or scan(*args))

    def wait():
        before = len(scans)
        until(lambda: len(scans) > before + 1)

    return wait


@pytest.fixture
def watch(backend):
    """``watch(*paths)``: start a watcher and return the list of paths that it reports."""
    started = []

    def start(*paths, **options):
        reported = []
        watching = TasksFileWatcher(
            app_paths=paths, on_change=reported.append, debounce_ms=50, **options
        )
        assert watching.start() is True
        assert watching.start() is True
        started.append(watching)
        return reported

    yield start
    for watching in started:
        watching.stop()
        watching.stop()


def test_changed_task_files_are_reported_once(watch, tmp_path, until, scanned):
    """A changed, created or removed task file is reported once; other files are not."""
    old, new = tmp_path / "shop" / "tasks.py", tmp_path / "shop" / "deep" / "tasks.py"
    new.parent.mkdir(parents=True)
    (tmp_path / "__pycache__").mkdir()
    old.write_text("x = 1")
    reported = watch(tmp_path)
    scanned()
    (tmp_path / "views.py").write_text("")
    (tmp_path / "__pycache__" / "tasks.py").write_text("")
    new.write_text("y = 1")
    until(lambda: reported == [new])
    old.write_text("x = 1000")
    until(lambda: reported == [new, old])
    new.unlink()
    until(lambda: reported == [new, old, new])


def test_continuously_written_file_is_reported_after_debounce(
    watch, tmp_path, until, backend, scanned
):
    """A file that changes continuously is reported after its last change."""
    path = tmp_path / "tasks.py"
    reported = watch(tmp_path)
    scanned()
    for size in range(1, 21):
        path.write_text("x" * size)
        backend.sleep(0.02)
    until(lambda: reported)
    assert len(reported) < 20  # Usually one; more if the machine stalls between two writes.


def test_filenames_select_watched_files(watch, tmp_path, until, scanned):
    """Only files with one of the given names are reported."""
    reported = watch(tmp_path, filenames={"jobs.py"})
    scanned()
    (tmp_path / "tasks.py").write_text("")
    (tmp_path / "jobs.py").write_text("")
    until(lambda: reported == [tmp_path / "jobs.py"])


def test_callback_error_is_logged(tmp_path, until, scanned, caplog):
    """An exception of the callback is logged, and the next change is reported."""
    reported = []

    def fail(path):
        reported.append(path)
        raise ValueError("no")

    watching = TasksFileWatcher(app_paths=[tmp_path], on_change=fail, debounce_ms=0)
    watching.start()
    scanned()
    for size in (1, 2):
        (tmp_path / "tasks.py").write_text("x" * size)
        until(lambda size=size: len(reported) == size)
        scanned()
    watching.stop()
    assert "failed with ValueError" in caplog.text


def test_watcher_without_directory_does_not_start(tmp_path):
    """Without an existing directory start() returns false, and stop() does nothing."""
    watching = TasksFileWatcher(app_paths=[tmp_path / "gone"], on_change=print)
    assert watching.start() is False
    watching.stop()
