"""Implements ``restart_worker`` by an exit, after which a supervisor starts a new process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from zope.interface import implementer

from z4j_bare.errors import CommandError
from z4j_bare.interfaces import IProcessRestart
from z4j_bare.orchestrator_detect import detect_orchestrator
from z4j_bare.wire.command import CommandOutcome

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.commands.process_restart")

#: The exit code, ``EX_TEMPFAIL``. After exit code 0, supervisord's ``autorestart=unexpected`` (its
#: default), systemd's ``Restart=on-failure`` and Docker's ``on-failure`` do not restart the
#: process. systemd also counts an end by SIGTERM as success.
EXIT_CODE = 75

#: Minimum age in seconds of a process that a command may restart.
#: The minimum prevents repeated commands from causing a crash loop.
MIN_UPTIME = 60.0

#: Maximum seconds for stopping the agent, if the worker's own shutdown has not stopped the agent.
STOP_TIMEOUT = 5.0

#: Priority of a multiprocessing finalizer that runs after all others.
FINALIZER_PRIORITY = -1_000_000

#: Maps an engine to its signal for a warm shutdown, if that signal is not SIGTERM.
#: On SIGTERM, huey makes a cold shutdown.
_GRACEFUL_SIGNAL = {"huey": signal.SIGINT}


@implementer(IProcessRestart)
class ProcessRestart:
    """Restarts one engine's worker by ending its process.

    :param workers: the names of this process's worker, as the brain stores them.
    :param stop: stops the agent within the given seconds, and reports ``worker.offline``.
    :param grace: seconds allowed for finishing the running tasks.
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
        self._started_at = backend.now()
        self._requested = False

    @cached_property
    def is_supervised(self) -> bool:
        """Whether a supervisor would start this process again."""
        return detect_orchestrator().detected

    def request(self, worker: str) -> CommandOutcome:
        """Return the outcome of ``restart_worker``. Its ``after_stored`` ends the process.

        Raises ``CommandError`` if the worker belongs to another process, if no supervisor is
        detected, if the process is younger than :data:`MIN_UPTIME` seconds, or if a restart has
        already been requested.
        """
        if worker not in self._workers:
            raise CommandError(f"this command reached pid {os.getpid()}, which is not {worker}")
        orchestrator = detect_orchestrator()
        if not orchestrator.detected:
            reason = "no known supervisor restarts"
            if orchestrator.signal:
                reason = f"{orchestrator.signal} says that nothing restarts"
            raise CommandError(
                f"{reason} pid {os.getpid()}; set Z4J_ORCHESTRATED=1 if a supervisor does"
            )
        uptime = self._backend.now() - self._started_at
        if uptime < MIN_UPTIME:
            raise CommandError(
                f"pid {os.getpid()} has run for {uptime:.0f} s;"
                f" it may be restarted after {MIN_UPTIME:g} s"
            )
        if self._requested:
            raise CommandError(f"pid {os.getpid()} is already being restarted")
        self._requested = True
        logger.warning(
            "z4j: an operator restarts %s: this process ends now, with exit code %d",
            worker,
            EXIT_CODE,
        )
        return CommandOutcome.success(
            {
                "restarted_via": "self_exit",
                "worker_name": worker,
                "pid": os.getpid(),
                "supervisor": orchestrator.signal,
                "exit_in_seconds": self._grace + STOP_TIMEOUT,
            },
            self._shutdown,
        )

    def _shutdown(self) -> None:
        """Send the worker its shutdown signal; end the process after ``grace`` seconds.

        The worker's own shutdown also stops the agent. If no handler for the signal is installed,
        stop the agent and end the process without the signal.
        """
        set_exit_code(self._finish)
        number = _GRACEFUL_SIGNAL.get(self._engine, signal.SIGTERM)
        if is_caught(number):
            os.kill(os.getpid(), number)
            self._backend.sleep(self._grace)
            logger.warning(
                "z4j: the worker did not stop within %g s; ending its process", self._grace
            )
        self._finish()

    def _finish(self) -> None:
        self._stop(STOP_TIMEOUT)
        exit_now()


class _ExitCodeFinalizer:
    """Ends the process with :data:`EXIT_CODE` when the interpreter clears ``sys``.

    ``sys`` is the last module but one that the interpreter clears.
    """

    def __del__(
        self, exit_process: Callable[[int], object] = os._exit, code: int = EXIT_CODE
    ) -> None:
        exit_process(code)


def set_exit_code(finish: Callable[[], object]) -> None:
    """Make the process exit with :data:`EXIT_CODE` after all of the host's exit hooks.

    An ``atexit`` hook that ended the process would skip the hooks that were registered before it.
    Therefore an object in ``sys`` ends the process when the interpreter clears ``sys``. An object
    in a module of the agent could outlive the interpreter, because a thread may still refer to the
    module.

    A child process of ``multiprocessing``, such as a Dramatiq worker, never finalizes its
    interpreter, but runs the finalizers of ``multiprocessing``. So ``finish`` is registered as the
    last finalizer.
    """
    processes, hooks = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "util"))
    if processes is not None and hooks is not None and processes.parent_process() is not None:
        hooks.Finalize(None, finish, exitpriority=FINALIZER_PRIORITY)
    sys._z4j_last = _ExitCodeFinalizer()  # type: ignore[attr-defined]  # noqa: SLF001


def exit_now() -> None:
    """Flush stdout and stderr and end the process at once, without exit hooks."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # the stream is absent, broken or closed
            continue
    os._exit(EXIT_CODE)


def is_caught(number: int, status: Path = Path("/proc/self/status")) -> bool:
    """Return whether this process has a handler for a signal, gevent's handlers included.

    gevent installs its handlers in C, and :func:`signal.getsignal` does not report these handlers.
    """
    try:
        fields = dict(
            line.split(":", 1)
            for line in status.read_text(encoding="ascii", errors="replace").splitlines()
        )
        return bool(int(fields["SigCgt"], 16) >> (number - 1) & 1)
    except (OSError, KeyError, ValueError):
        return callable(signal.getsignal(number))
