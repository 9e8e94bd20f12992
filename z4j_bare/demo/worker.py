"""Runs a real Celery worker as a subprocess."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import z4j_bare
from z4j_bare.demo.process import Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Celery's worker pools.
POOLS = ("gevent", "eventlet", "threads", "solo", "prefork")

#: Default number of concurrent tasks of each pool.
CONCURRENCY = {"gevent": 20, "eventlet": 20, "threads": 8, "solo": 1, "prefork": 2}

#: Maximum seconds until a started worker consumes messages.
_READY_TIMEOUT = 60.0


def worker_environment(extra: Mapping[str, str], python: str = sys.executable) -> dict[str, str]:
    """Return a clean environment plus ``extra``, for the interpreter ``python``.

    ``sys.executable`` imports this ``z4j_bare``. Any other interpreter imports the ``z4j_bare`` of
    its own virtual environment.
    """
    environment = clean_environment()
    search_path = environment.pop("PYTHONPATH", "")
    if python == sys.executable:
        package_root = str(Path(z4j_bare.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, search_path)))
    return {**environment, **extra}


class Worker(Service):
    """A ``celery worker`` process.

    :param app: the application's module.
    :param environment: variables in addition to a clean environment, usually
        ``Credentials.env(...)`` and the variables that the module reads.
    :param broker: the broker's URL, if the module does not set it.
    :param concurrency: number of concurrent tasks, by default the number in :data:`CONCURRENCY`.
    :param name: the worker's name. It must contain no dot, because the brain redacts a name with
        a dot as an e-mail address.
    :param options: additional command-line options.
    :param python: the interpreter, for example of another virtual environment.
    """

    def __init__(
        self,
        app: str,
        *,
        pool: str,
        log: Path,
        environment: Mapping[str, str],
        broker: str | None = None,
        concurrency: int | None = None,
        name: str = "worker@demo",
        options: Sequence[str] = (),
        python: str = sys.executable,
    ) -> None:
        self.name = name
        self.pool = pool
        command = [python, "-m", "celery", "-A", app, *(("-b", broker) if broker else ()), "worker"]
        command += ["--pool", pool, "--concurrency", str(concurrency or CONCURRENCY[pool])]
        command += ["--hostname", name, "--loglevel", "INFO", *options]
        super().__init__(
            f"the {pool} worker",
            command,
            environment=worker_environment(environment, python),
            cwd=log.parent,
            log=log,
        )

    def start(self, timeout: float = _READY_TIMEOUT) -> None:
        """Start the worker and wait at most ``timeout`` seconds until it consumes messages."""
        offset = len(self.output())
        self.spawn(lambda: f"{self.name} ready." in self.output()[offset:], timeout)
