"""The real brain as a subprocess: SQLite, a private home, loopback."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from z4j_bare.demo.process import HarnessError, Service, clean_environment
from z4j_bare.demo.rest import BrainApi, generate_password

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

_BOOT_SECONDS = 60.0

#: Seconds that the brain waits for SQLite while another connection of its own writes. With the driver's 5 it answers 500
#: to an operator's request on a machine whose disk stalls.
_DATABASE_SECONDS = 20


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def brain_command() -> Path | None:
    """Return the brain's console script in this environment, ``None`` when it is not installed here."""
    script = Path(sys.executable).with_name("z4j")
    return script if script.exists() else None


class Brain(BrainApi):
    """A brain on ``home`` (made private) and a free ``port``, and a session with it as its administrator.

    ``environment`` is added to its own, for instance ``Z4J_COMMAND_TIMEOUT_SECONDS``. Use it as a context
    manager, or call ``start`` and ``stop``; it may be stopped, killed and started again, always on the same home
    and port.
    """

    email = "admin@example.test"

    def __init__(
        self, home: Path, *, port: int = 0, environment: Mapping[str, str] | None = None
    ) -> None:
        self.home = home
        self.port = port or free_port()
        self.password = generate_password()
        self.log = home / "brain.log"
        self._extra = dict(environment or {})
        self._service: Service | None = None
        super().__init__(f"http://127.0.0.1:{self.port}")

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._service is not None and self._service.running

    @property
    def pid(self) -> int:
        """Its process id; ``HarnessError`` before ``start``."""
        return self._require_service().pid

    def start(self, timeout: float = _BOOT_SECONDS) -> None:
        """Boot it, at most ``timeout`` seconds (3 to 5 s on an empty home), and log in."""
        self._service = self._service or self._build_service()
        self._service.spawn(self.healthy, timeout)
        self.login(self.email, self.password)

    def stop(self, timeout: float = 20.0) -> None:
        """End it with SIGTERM; its agents see close code 1012. It waits for polls, at most ``timeout`` seconds."""
        self.close()
        if self._service:
            self._service.stop(timeout)

    def kill(self) -> None:
        """SIGKILL it; its agents see the connection reset."""
        self.close()
        if self._service:
            self._service.kill()

    def restart(self) -> None:
        """Stop it and start it again with everything it knew."""
        self.stop()
        self.start()

    def wait(self) -> None:
        """Wait until it ends by itself."""
        self._require_service().wait()

    def _build_service(self) -> Service:
        script = brain_command()
        if script is None:
            raise HarnessError(
                "there is no brain in this environment: pip install 'z4j-bare[demo]'"
            )
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {
            **clean_environment(),
            "HOME": str(self.home),
            "Z4J_HOME": str(self.home),
            "Z4J_DATABASE_URL": f"sqlite+aiosqlite:///{self.home.resolve()}/z4j.db?timeout={_DATABASE_SECONDS}",
            "Z4J_ENVIRONMENT": "dev",  # otherwise its cookies are marked Secure and plain http cannot log in
            "Z4J_BOOTSTRAP_ADMIN_EMAIL": self.email,
            "Z4J_BOOTSTRAP_ADMIN_PASSWORD": self.password,
            **self._extra,
        }
        command = [str(script), "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        return Service("the brain", command, environment=environment, cwd=self.home, log=self.log)

    def _require_service(self) -> Service:
        if self._service is None:
            raise HarnessError("the brain is not started")
        return self._service

    def __enter__(self) -> Self:
        self.start()
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
