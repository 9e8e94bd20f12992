"""Subprocesses that end with whoever started them."""

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
    from types import TracebackType

T = TypeVar("T")


class HarnessError(AgentError):
    """A peer that the demo or a test started did not do its part; ``log`` is the file that says why."""

    def __init__(self, message: str, *, log: Path | None = None) -> None:
        super().__init__(f"{message} (log: {log})" if log else message)
        self.log = log


def until(check: Callable[[], T], what: str, *, timeout: float, interval: float = 0.05) -> T:
    """Call ``check`` every ``interval`` seconds and return its first true value.

    Raises ``HarnessError`` saying that ``what`` did not come within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        if value := check():
            return value
        if time.monotonic() >= deadline:
            raise HarnessError(f"{what}: not within {timeout:g} s")
        time.sleep(interval)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would steer a brain or a worker behind our back."""
    strays = ("Z4J_", "CELERY_", "DJANGO_")
    return {name: value for name, value in os.environ.items() if not name.startswith(strays)}


class Service:
    """One subprocess in a session of its own, so that Ctrl-C in a terminal reaches only whoever started it.

    Its output is appended to ``log``. As a context manager it is stopped at the end of the block, and killed
    when the block fails. ``title`` is how error messages call it; ``cwd`` becomes its working directory.
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
        """The process id; ``HarnessError`` when it was never started."""
        if self._process is None:
            raise HarnessError(f"{self.title} is not started")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended: ``None`` while it runs or before it started, negative for a signal."""
        return self._process.poll() if self._process else None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def spawn(self, ready: Callable[[], bool], timeout: float) -> None:
        """Start it and wait at most ``timeout`` seconds until ``ready`` says true.

        When it ends early or does not get ready it is killed, and ``HarnessError`` names the log.
        """
        if self.running:
            raise HarnessError(f"{self.title} runs already, as process {self.pid}")
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
                    f"{self.title} did not come up within {timeout:g} s", log=self.log
                ) from None
            raise
        if not self.running:
            raise HarnessError(
                f"{self.title} ended with code {self.exit_code} while starting", log=self.log
            )

    def stop(self, timeout: float = 20.0) -> int:
        """Ask it to end, wait ``timeout`` seconds, kill what is left; return the exit code."""
        if self._process is None:
            return 0
        if self.running:
            # only the leader: Celery's prefork children would take a SIGTERM of their own as "die now"
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                pass
        return self.kill()

    def kill(self) -> int:
        """SIGKILL it with everything it started; return the exit code."""
        if self._process is None:
            return 0
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self._process.wait()

    def wait(self) -> int:
        """Wait until it ends by itself; return the exit code."""
        return self._process.wait() if self._process else 0

    def output(self) -> str:
        """Return everything it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()
