"""``restart_worker`` for engines that have none: this process ends, and whatever supervises it starts a new one."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import CommandError
from z4j_bare.orchestrator_detect import detect_orchestrator

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.departure")

#: The exit code, ``EX_TEMPFAIL``. Not 0: supervisord's ``autorestart=unexpected``, its default, systemd's
#: ``Restart=on-failure`` and Docker's ``on-failure`` do not start again what ended well, as by SIGTERM for systemd.
EXIT_CODE = 75

#: Seconds that a process must have run, so that a command that comes again and again is no crash loop.
MIN_UPTIME = 60.0

#: Seconds for the agent's own end where nobody else brings it about.
STOP = 5.0

#: The priority of the last of multiprocessing's exit hooks.
LAST = -1_000_000

#: The signal at which an engine's worker finishes what it runs; huey takes SIGTERM for "at once".
_GRACEFUL = {"huey": signal.SIGINT}


@dataclass(frozen=True, slots=True)
class RestartAccepted:
    """A good answer, and what has to be done once it is stored."""

    result: dict[str, Any]
    then: Callable[[], object]
    status: str = "success"
    error: str | None = None


class ProcessRestart:
    """The way out for one engine's worker.

    :param workers: names of this process's own worker, as the brain keeps them.
    :param stop: ends the agent within so many seconds: everything sent or stored, ``worker.offline`` announced.
    :param grace: seconds that the worker has for the tasks it runs.
    """

    def __init__(
        self,
        engine: str,
        workers: Collection[str],
        stop: Callable[[float], None],
        backend: BaseConcurrency,
        grace: float,
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._stop = stop
        self._backend = backend
        self._grace = grace
        self._began = backend.now()
        self._leaving = False

    @cached_property
    def possible(self) -> bool:
        """Whether this process would be started again; the brain is told of no ability otherwise."""
        return detect_orchestrator().detected

    def order(self, worker: str) -> RestartAccepted:
        """Return the answer to ``restart_worker``; raise ``CommandError`` where leaving would be wrong."""
        if worker not in self._workers:
            raise CommandError(f"this command reached pid {os.getpid()}, which is not {worker}")
        found = detect_orchestrator()
        if not found.detected:
            why = (
                f"{found.signal} says that nothing" if found.signal else "nothing that is known of"
            )
            raise CommandError(
                f"{why} starts pid {os.getpid()} again; set Z4J_ORCHESTRATED=1 if something does"
            )
        age = self._backend.now() - self._began
        if age < MIN_UPTIME:
            raise CommandError(
                f"pid {os.getpid()} runs for {age:.0f} s; it may be restarted after {MIN_UPTIME:g} s"
            )
        if self._leaving:
            raise CommandError(f"pid {os.getpid()} is on its way out already")
        self._leaving = True
        logger.warning(
            "z4j: an operator restarts %s: this process ends now, with exit code %d",
            worker,
            EXIT_CODE,
        )
        facts = {
            "restarted_via": "self_exit",
            "worker_name": worker,
            "pid": os.getpid(),
            "supervisor": found.signal,
        }
        return RestartAccepted({**facts, "exit_in_seconds": self._grace + STOP}, self._leave)

    def _leave(self) -> None:
        """Have the worker finish by the signal that it knows, which stops the agent too; else end everything ourselves."""
        end_with_failure(self._finish)
        number = _GRACEFUL.get(self._engine, signal.SIGTERM)
        if is_caught(number):
            os.kill(os.getpid(), number)
            self._backend.sleep(self._grace)
            logger.warning("z4j: the worker has not ended within %g s; it ends now", self._grace)
        self._finish()

    def _finish(self) -> None:
        self._stop(STOP)
        leave_now()


class _Last:
    """Gives the process its exit code when the interpreter takes ``sys`` apart, last but one of all modules."""

    def __del__(self, leave: Callable[[int], object] = os._exit, code: int = EXIT_CODE) -> None:
        leave(code)


def end_with_failure(finish: Callable[[], object]) -> None:
    """Let the process end with :data:`EXIT_CODE`, however it ends, once all exit hooks of the host have run.

    A child of multiprocessing, such as Dramatiq's workers, has other hooks and never ends its interpreter: ``finish`` is
    the last of those.

    An ``atexit`` hook of ours that ended the process would skip those that were registered before it. A module of ours may
    outlive the interpreter, held by a thread; ``sys`` does not.
    """
    processes, hooks = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "util"))
    if processes is not None and hooks is not None and processes.parent_process() is not None:
        hooks.Finalize(None, finish, exitpriority=LAST)
    sys._z4j_last = _Last()  # type: ignore[attr-defined]  # noqa: SLF001


def leave_now() -> None:
    """End the process at once."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # none, broken or closed
            continue
    os._exit(EXIT_CODE)


def is_caught(number: int, status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process has a handler for a signal. gevent's are in C, and Python knows nothing of them."""
    try:
        fields = dict(
            line.split(":", 1)
            for line in status.read_text(encoding="ascii", errors="replace").splitlines()
        )
        return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)
    except (OSError, KeyError, ValueError):
        return callable(signal.getsignal(number))
