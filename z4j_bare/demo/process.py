"""Runs the subprocesses of the demo, the tests and the benchmarks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self, TypeVar

from z4j_bare.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")


class HarnessError(AgentError):
    """A process of the demo or of a test failed.

    ``log`` is the process's log file if the log contains the cause, else ``None``.
    """

    def __init__(self, message: str, *, log: Path | None = None) -> None:
        super().__init__(f"{message} (log: {log})" if log else message)
        self.log = log


def until(check: Callable[[], T], what: str, *, timeout: float, interval: float = 0.05) -> T:
    """Call ``check`` every ``interval`` seconds and return its first true value.

    :param what: the awaited condition, for the error message.
    :raises HarnessError: ``check`` returned no true value within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        if value := check():
            return value
        if time.monotonic() >= deadline:
            raise HarnessError(f"{what}: not within {timeout:g} s")
        time.sleep(interval)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without variables that configure z4j, Celery or Django."""
    prefixes = ("Z4J_", "CELERY_", "DJANGO_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


class Service:
    """A subprocess in its own session, so that Ctrl-C in a terminal reaches only its parent.

    The end of a ``with`` block stops the process. An exception in the block kills the process.

    :param title: the name of the process in error messages.
    :param log: file to which the process appends its output.
    """

    def __init__(
        self,
        title: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path,
        log: Path,
    ) -> None:
        self.title = title
        self.command = list(command)
        self.environment = dict(environment)
        self.cwd = cwd
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id; raises ``HarnessError`` if the process was never started."""
        if self._process is None:
            raise HarnessError(f"{self.title} was not started")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code: negative after a signal, ``None`` before the start and while running."""
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        """Whether the process was started and has not exited."""
        return self._process is not None and self._process.poll() is None

    def spawn(self, ready: Callable[[], bool], timeout: float) -> None:
        """Start the process and wait until ``ready()`` is true.

        :param timeout: maximum time to wait, in seconds.
        :raises HarnessError: the process exited or was not ready in time. The process has been
            killed, and the error names the process's log.
        """
        if self.running:
            raise HarnessError(f"{self.title} is already running as process {self.pid}")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.cwd,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            until(lambda: not self.running or ready(), self.title, timeout=timeout)
        except BaseException as exc:
            self.kill()
            if isinstance(exc, HarnessError):
                raise HarnessError(
                    f"{self.title} was not ready within {timeout:g} s", log=self.log
                ) from None
            raise
        if not self.running:
            raise HarnessError(
                f"{self.title} exited with code {self.exit_code} while starting", log=self.log
            )

    def stop(self, timeout: float = 20.0) -> int:
        """Send SIGTERM, wait for the exit, then kill all remaining children; return the exit code.

        :param timeout: maximum seconds until the process exits. After the timeout, the process is
            killed.
        """
        if self._process is None:
            return 0
        if self.running:
            # Only the session's leader gets SIGTERM, because SIGTERM would end prefork children at
            # once.
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                pass
        return self.kill()

    def kill(self) -> int:
        """Kill the process and all its children; return the exit code."""
        if self._process is None:
            return 0
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self._process.wait()

    def wait(self) -> int:
        """Wait until the process exits; return the exit code."""
        return self._process.wait() if self._process else 0

    def output(self) -> str:
        """Return the content of the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_exc_info: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()
