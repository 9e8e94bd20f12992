"""Reads the role of this process from its command line, before Celery has parsed it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery.worker.consumer import Consumer

_consumer: Consumer | None = None
_is_celery_worker = False
_importing_application = False

#: Short-lived sub-commands of ``celery``, and the monitor Flower.
#: An agent in such a process would leave a stale worker in the brain.
_INSPECTION_COMMANDS = frozenset({
    "amqp", "call", "control", "events", "flower", "graph", "inspect", "list", "logtool",
    "migrate", "multi", "purge", "report", "result", "shell", "status", "upgrade",
})  # fmt: skip

#: The worker programs and Django commands of the engines whose events name no worker.
_WORKER_PROGRAMS = {"huey": {"huey_consumer", "run_huey"}, "arq": {"arq"}, "taskiq": {"taskiq"}}

#: Global options of ``celery`` whose value is a separate word.
_OPTIONS_WITH_VALUE = frozenset(
    {"-A", "--app", "-b", "--broker", "--result-backend", "--loader", "--config", "--workdir"}
)


def celery_command(argv: Sequence[str] | None = None) -> str | None:
    """Return the sub-command of a ``celery`` command line, such as ``worker``.

    Returns ``None`` for any other process. Recognises ``celery ...``, ``python -m celery ...`` and
    both after a launcher such as ``uv run``.
    """
    words = list(sys.argv if argv is None else argv)
    for index, word in enumerate(words[:6]):
        path = PurePath(word)
        if path.stem == "celery" or (path.name == "__main__.py" and path.parent.name == "celery"):
            return _first_command(words[index + 1 :])
    return None


def is_inspection_command(argv: Sequence[str] | None = None) -> bool:
    """Return whether this process is ``celery inspect`` or the like, in which no agent starts."""
    return celery_command(argv) in _INSPECTION_COMMANDS


def is_celery_worker(argv: Sequence[str] | None = None) -> bool:
    """Return whether this process is a Celery worker.

    Before ``worker_init`` is sent, the command line is the only indication.
    """
    return celery_command(argv) == "worker" or (argv is None and _is_celery_worker)


def mark_celery_worker() -> None:
    """Record that this process is a Celery worker, whatever its command line shows."""
    global _is_celery_worker
    _is_celery_worker = True


def local_worker_name(engine: str, argv: Sequence[str] | None = None) -> str | None:
    """Return a worker name for this process if it is a worker of ``engine``, else ``None``.

    The name is needed only for engines whose events name no worker.
    """
    # Both lists are searched. taskiq removes its name from ``sys.argv``, but a child of
    # multiprocessing has the program's name only in ``sys.argv``.
    words = [*sys.argv[:3], *sys.orig_argv[:4]] if argv is None else list(argv)[:3]
    if {PurePath(word).stem for word in words}.isdisjoint(_WORKER_PROGRAMS.get(engine, ())):
        return None
    return f"{engine}@{platform.node()}-{os.getpid()}"


def track_worker_ready() -> None:
    """Record when ``worker_ready`` is sent. Celery must be imported.

    Celery sends ``worker_ready`` once. An agent that is installed during that signal (as z4j_celery
    does) or later must start immediately, so it must know that the signal was sent. Therefore this
    function runs when z4j_bare is imported.
    """
    from celery import signals

    signals.worker_ready.connect(_on_worker_ready, weak=False)


def ready_worker() -> Consumer | None:
    """Return the Consumer of this Celery worker, or ``None`` before ``worker_ready`` is sent."""
    return _consumer


@contextmanager
def importing_application() -> Iterator[None]:
    """Mark the block in which a z4j-bare command imports an application.

    An agent that the application installs in this block does not start: ``z4j-bare run`` starts its
    own agent, and ``doctor`` must not start an agent.
    """
    global _importing_application
    previous, _importing_application = _importing_application, True
    try:
        yield
    finally:
        _importing_application = previous


def is_importing_application() -> bool:
    """Return whether a z4j-bare command is importing an application."""
    return _importing_application


def _on_worker_ready(sender: Consumer | None = None, **_kwargs: object) -> None:
    global _consumer
    _consumer = sender


def _first_command(words: Sequence[str]) -> str:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in _OPTIONS_WITH_VALUE:
            skip = True
        elif not word.startswith("-"):
            return word
    return ""
