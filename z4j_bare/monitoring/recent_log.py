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

#: Maximum number of frames of an exception that are kept, the innermost ones.
MAX_FRAMES = 10


class LogLine(NamedTuple):
    """A logged line. ``time`` is in seconds since the epoch."""

    time: float
    level: str
    logger: str
    text: str


class RecentLog(logging.Handler):
    """Keeps the last lines in memory.

    ``logging`` holds the lock of a handler while the handler runs. A native thread that holds a
    monkey-patched lock can block the hub. This handler has no lock, because a deque needs none.
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
            # The host's code called the logger. It must not see an error of this handler.
            return False
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line as text, because a record refers to frames and to the host's objects."""
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

        ``logging`` would do it, but counts this handler.
        """
        if logging.lastResort is not None:
            logging.lastResort.handle(record)


#: The lines of this process. A restart of the agent keeps them.
recent_log = RecentLog()


def start_recording() -> None:
    """Keep the lines that are logged from now on. Idempotent.

    The effective level of a logger decides which lines are logged. This function changes no level,
    because the host's handlers would then print more.
    """
    logging.getLogger(LOGGER).addHandler(recent_log)


def _message(record: logging.LogRecord) -> str:
    """Return the message; an argument that is an unknown error is shown as its class."""
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
    """Return the frames as text, innermost last. No source is read, because this is the hub."""
    places: deque[str] = deque(maxlen=MAX_FRAMES)
    while traceback is not None:
        code = traceback.tb_frame.f_code
        name = "/".join(PurePath(code.co_filename).parts[-3:])
        places.append(f"\n  {name}:{traceback.tb_lineno} in {code.co_name}")
        traceback = traceback.tb_next
    return "".join(places)
