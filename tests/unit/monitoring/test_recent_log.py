"""The log lines that the agent keeps for a bug report."""

import logging
import subprocess
import sys
import threading

import pytest

from z4j_bare.errors import AgentError
from z4j_bare.monitoring import recent_log
from z4j_bare.monitoring.recent_log import MAX_CHARS, MAX_FRAMES, MAX_LINES, RecentLog

SECRET_ARGUMENT = "4929-1234"


@pytest.fixture
def kept(monkeypatch):
    """A recording of the logger ``z4j``; returns the kept lines."""
    handler = RecentLog()
    monkeypatch.setattr(recent_log, "recent_log", handler)
    recent_log.start_recording()
    yield handler.lines
    logging.getLogger("z4j").removeHandler(handler)


def test_lines_of_agent_and_adapters_are_kept(kept):
    """The last lines of every logger below ``z4j`` are kept, other loggers' are not."""
    for number in range(MAX_LINES + 3):
        logging.getLogger("z4j.adapter.celery").warning("line %d", number)
    logging.getLogger("shop").warning("not ours")
    assert len(kept) == MAX_LINES
    last = kept[-1]
    assert last[1:] == ("WARNING", "z4j.adapter.celery", f"line {MAX_LINES + 2}")


def test_text_of_foreign_error_is_omitted(kept):
    """The text of an error that may contain a task's arguments is not kept, in no place."""

    def fail(depth):
        if depth:
            fail(depth - 1)
        raise ValueError(SECRET_ARGUMENT)

    logger = logging.getLogger("z4j.runtime.of_test")
    try:
        fail(2 * MAX_FRAMES)
    except ValueError as error:
        logger.warning("z4j: failed: %s", error, exc_info=True)
    logger.warning("z4j: failed: %s", AgentError("the brain refuses the token"))
    logger.warning("z4j: failed: %s", PermissionError(13, "Permission denied", SECRET_ARGUMENT))
    first, second, third = (line.text for line in kept)
    head, name, *frames = first.splitlines()
    assert (head, name, len(frames)) == ("z4j: failed: ValueError", "ValueError", MAX_FRAMES)
    assert "monitoring/test_recent_log.py" in frames[-1]
    assert frames[-1].endswith("in fail")
    assert second == "z4j: failed: AgentError: the brain refuses the token"
    assert third == "z4j: failed: PermissionError: Permission denied"
    assert SECRET_ARGUMENT not in str(kept)


def test_long_line_is_cut(kept):
    """A kept line has a maximum length."""
    logging.getLogger("z4j.runtime.of_test").warning("x" * 10 * MAX_CHARS)
    assert kept[0].text == "x" * MAX_CHARS


def test_logging_waits_for_no_lock(kept):
    """The handler has no lock, and a line is kept while another thread holds every lock."""
    handler = recent_log.recent_log
    assert handler.lock is None
    handler.acquire()
    done = threading.Event()

    def log():
        logging.getLogger("z4j.runtime.of_test").warning("from a thread")
        done.set()

    threading.Thread(target=log, daemon=True).start()
    assert done.wait(10)
    handler.release()
    assert kept[-1].text == "from a thread"


def test_broken_record_does_not_raise(kept):
    """A record whose text cannot be formatted reaches the other handlers and raises nothing."""
    record = logging.LogRecord("z4j.x", logging.ERROR, __file__, 1, "%d", ("x",), None)
    assert recent_log.recent_log.handle(record) is False
    assert list(kept) == []


WITHOUT_HANDLERS = """
import logging
from z4j_bare.monitoring.recent_log import recent_log, start_recording
start_recording()
logger = logging.getLogger("z4j.runtime.of_test")
logger.setLevel("INFO")
logger.info("quiet")
logger.warning("printed")
logger.addHandler(logging.NullHandler())
logger.warning("handled")
print(*(line.text for line in recent_log.lines))
"""


def test_process_without_handlers_still_prints_warnings():
    """Warnings are printed to stderr once, as in a process without this handler; INFO is not."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HANDLERS],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == "printed\n"
    assert done.stdout == "quiet printed handled\n"
