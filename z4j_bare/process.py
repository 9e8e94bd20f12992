"""What kind of process we are in, read from its command line before Celery itself knows."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

_consumer: Any = None
_loading = False

#: Celery's own sub-commands that come and go; an agent in one would leave a ghost row in the brain.
_INSPECTION_COMMANDS = {
    "amqp",
    "call",
    "control",
    "events",
    "graph",
    "inspect",
    "list",
    "logtool",
    "migrate",
} | {"multi", "purge", "report", "result", "shell", "status", "upgrade"}

#: The programs, or Django's command, that run the workers of engines whose adapters name no worker in their events.
_WORKER_PROGRAMS = {"huey": {"huey_consumer", "run_huey"}, "arq": {"arq"}, "taskiq": {"taskiq"}}

#: Global options of the ``celery`` command that take their value as a word of its own.
_WITH_VALUE = frozenset(
    {"-A", "--app", "-b", "--broker", "--result-backend", "--loader", "--config", "--workdir"}
)


def celery_command(argv: Sequence[str] | None = None) -> str | None:
    """Return the sub-command of a ``celery`` command line, such as ``worker``, or ``None`` for any other process.

    Recognises ``celery ...``, ``python -m celery ...`` and both behind launchers such as ``uv run``.
    """
    words = list(sys.argv if argv is None else argv)
    for index, word in enumerate(words[:6]):
        path = PurePath(word)
        if path.stem == "celery" or (path.name == "__main__.py" and path.parent.name == "celery"):
            return _first_command(words[index + 1 :])
    return None


def is_inspection_command(argv: Sequence[str] | None = None) -> bool:
    """Whether this is ``celery inspect`` and its like, where the agent stays inert."""
    return celery_command(argv) in _INSPECTION_COMMANDS


def is_celery_worker(argv: Sequence[str] | None = None) -> bool:
    """Whether this process was started as a Celery worker."""
    return celery_command(argv) == "worker"


def local_worker_name(engine: str, argv: Sequence[str] | None = None) -> str | None:
    """Return a name for the worker that this process is, of an engine whose events name none; ``None`` if it is none."""
    # taskiq takes its own name off sys.argv, and a child of multiprocessing has lost it elsewhere.
    words = [*sys.argv[:3], *sys.orig_argv[:4]] if argv is None else list(argv)[:3]
    if {PurePath(word).stem for word in words}.isdisjoint(_WORKER_PROGRAMS.get(engine, ())):
        return None
    return f"{engine}@{platform.node()}-{os.getpid()}"


def track_worker_ready() -> None:
    """In a Celery worker, remember that ``worker_ready`` has been sent.

    Called when this package is imported, which an app module does long before: an agent that is installed from inside
    that signal (z4j_celery's own way) or later, from a task, has to start at once, and the signal keeps no such memory.
    """
    if "celery" in sys.modules and is_celery_worker():
        from celery import signals

        signals.worker_ready.connect(_note_ready, weak=False)


def ready_worker() -> Any:
    """Return the Consumer of this process's Celery worker once ``worker_ready`` has been sent, else ``None``."""
    return _consumer


@contextmanager
def importing_application() -> Iterator[None]:
    """While a command of ours imports an application, the agent that it installs neither starts nor takes the process.

    ``z4j-bare run`` is that agent itself, with engines and settings of its own, and ``doctor`` must disturb nobody.
    """
    global _loading
    before, _loading = _loading, True
    try:
        yield
    finally:
        _loading = before


def is_importing_application() -> bool:
    """Whether an application is being imported for a command of ours."""
    return _loading


def _note_ready(sender: Any = None, **_kwargs: Any) -> None:
    global _consumer
    _consumer = sender


def _first_command(words: Sequence[str]) -> str:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in _WITH_VALUE:
            skip = True
        elif not word.startswith("-"):
            return word
    return ""
