"""Keeps the last lines that the agent has logged, for ``z4j-bare doctor --bundle``."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import PurePath
from types import TracebackType
from typing import NamedTuple

from z4j_bare.errors import AgentError

#: The logger above all loggers of the agent and of its adapters.
LOGGER = "z4j"

#: Maximum number of lines that are kept.
MAX_LINES = 500

#: Maximum characters of a line, without its frames.
MAX_CHARS = 1_000

#: Maximum number of frames of an exception that are kept, counted from the innermost.
MAX_FRAMES = 10


class LogLine(NamedTuple):
    """A logged line. ``time`` is in seconds since the epoch."""

    time: float
    level: str
    logger: str
    text: str


class RecentLog(logging.Handler):
    """Keeps the last lines in memory.

    This handler has no lock, because a deque needs none. ``logging`` would hold a handler's lock
    while the handler runs, and a native thread that holds a monkey-patched lock can block the hub.
    """

    def __init__(self) -> None:
        self.lines: deque[LogLine] = deque(maxlen=MAX_LINES)
        super().__init__()

    def createLock(self) -> None:  # noqa: N802 - the name is logging's
        """Create no lock."""
        self.lock = None

    def _at_fork_reinit(self) -> None:
        """Do nothing in a forked child, because there is no lock."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Keep the line. Never waits, never raises."""
        try:
            self.emit(record)
            if record.levelno >= logging.WARNING and self._is_only_handler(record):
                self._print(record)
        except Exception:
            # An error of this handler must not reach the host's code that called the logger.
            return False
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line as text. A record would keep frames and the host's objects in memory."""
        text = _message(record)[:MAX_CHARS]
        if record.exc_info and record.exc_info[0]:
            kind, error, frames = record.exc_info
            text += f"\n{_describe(error) if error is not None else kind.__name__}{_places(frames)}"
        self.lines.append(LogLine(record.created, record.levelname, record.name, text))

    def _is_only_handler(self, record: logging.LogRecord) -> bool:
        logger = logging.Logger.manager.loggerDict.get(record.name)
        while isinstance(logger, logging.Logger):
            if any(handler is not self for handler in logger.handlers):
                return False
            if not logger.propagate or logger.parent is None:
                break
            logger = logger.parent
        return True

    def _print(self, record: logging.LogRecord) -> None:
        """Print the line as Python does in a process without handlers.

        ``logging`` itself does not print it, because this handler counts as a handler.
        """
        if logging.lastResort is not None:
            logging.lastResort.handle(record)


#: The last lines of this process. A restart of the agent does not clear the lines.
recent_log = RecentLog()


def start_recording() -> None:
    """Keep the lines that are logged from now on. Idempotent.

    The effective level of a logger decides which lines are logged.
    This function changes no level, because a lower level would make the host's handlers print more.
    """
    logging.getLogger(LOGGER).addHandler(recent_log)


def _message(record: logging.LogRecord) -> str:
    """Return the message. An argument that is an exception is shown by :func:`_describe`."""
    arguments = record.args
    if isinstance(arguments, tuple):
        arguments = tuple(
            _describe(each) if isinstance(each, BaseException) else each for each in arguments
        )
    return str(record.msg) % arguments if arguments else str(record.msg)


def _describe(error: BaseException) -> str:
    """Return class and text of an error of the agent or of the operating system.

    The text of any other error is omitted, because it may contain the arguments of a task.
    """
    text: object = None
    if isinstance(error, AgentError):
        text = error
    elif isinstance(error, OSError):
        text = error.strerror
    return type(error).__name__ + (f": {text}" if text else "")


def _places(traceback: TracebackType | None) -> str:
    """Return the frames as text, innermost last. Reads no file, because the hub must not wait."""
    places: deque[str] = deque(maxlen=MAX_FRAMES)
    while traceback is not None:
        code = traceback.tb_frame.f_code
        name = "/".join(PurePath(code.co_filename).parts[-3:])
        places.append(f"\n  {name}:{traceback.tb_lineno} in {code.co_name}")
        traceback = traceback.tb_next
    return "".join(places)
