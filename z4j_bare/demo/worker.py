"""A real Celery worker as a subprocess."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import z4j_bare
from z4j_bare.demo.process import Service, clean_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

POOLS = ("gevent", "eventlet", "threads", "solo", "prefork")
#: How many tasks each pool runs at a time when nobody says otherwise.
CONCURRENCY = {"gevent": 20, "eventlet": 20, "threads": 8, "solo": 1, "prefork": 2}
_READY_SECONDS = 60.0


def worker_environment(extra: Mapping[str, str], python: str = sys.executable) -> dict[str, str]:
    """Return a clean environment with ``extra``, and with the very ``z4j_bare`` that runs here.

    Another ``python`` than this one has a ``z4j_bare`` of its own and gets no search path from here.
    """
    environment = clean_environment()
    search_path = environment.pop("PYTHONPATH", "")
    if python == sys.executable:
        package_root = str(Path(z4j_bare.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, search_path)))
    return {**environment, **extra}


class Worker(Service):
    """``celery worker`` of ``pool`` for the application module ``app``, called ``name`` in the cluster.

    ``environment`` is added to a clean one, usually ``Credentials.env(...)`` and what the module reads;
    ``broker`` is passed as ``--broker`` when given; ``options`` go to the command line as they are; ``python``
    runs it in another virtual environment. A name without a dot survives the brain's redaction, which takes
    dotted ones for e-mail addresses.
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

    def start(self, timeout: float = _READY_SECONDS) -> None:
        """Start it and wait until it consumes, at most ``timeout`` seconds."""
        seen = len(self.output())
        self.spawn(lambda: f"{self.name} ready." in self.output()[seen:], timeout)
