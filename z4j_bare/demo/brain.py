"""The real brain as a subprocess, on the loopback interface, with SQLite or PostgreSQL."""

from __future__ import annotations

import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from z4j_bare.demo.process import HarnessError, Service, clean_environment
from z4j_bare.demo.rest import BrainApi, generate_password

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Maximum seconds from the start of the brain's process until the brain is healthy.
_BOOT_TIMEOUT = 60.0

#: Environment variables with the brain's secrets.
#: For a database in its own directory, the brain generates the secrets.
#: For any other database, the variables must have the values that were set during the migration.
SECRETS = ("Z4J_SECRET", "Z4J_SESSION_SECRET", "Z4J_AUDIT_CHAIN_SECRET")

#: SQLite's busy timeout in the brain, in seconds.
#: With the driver's default of 5 s the brain returns status 500 when the disk stalls.
_DATABASE_TIMEOUT = 20


def free_port() -> int:
    """Return a port of 127.0.0.1 that is currently unused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def brain_command() -> Path | None:
    """Return the path of the brain's console script, ``None`` if the brain is not installed."""
    script = Path(sys.executable).with_name("z4j")
    return script if script.exists() else None


def new_secrets() -> dict[str, str]:
    """Return values of :data:`SECRETS` for a database that no brain has used."""
    return {name: secrets.token_hex(32) for name in SECRETS}


def brain_environment(home: Path, database_url: str | None = None) -> dict[str, str]:
    """Return a clean environment of a brain process.

    :param home: the brain's directory, which contains the database by default.
    :param database_url: another database. It also needs the variables in :data:`SECRETS`.
    """
    own_database = f"sqlite+aiosqlite:///{home.resolve() / 'z4j.db'}?timeout={_DATABASE_TIMEOUT}"
    return {
        **clean_environment(),
        "HOME": str(home),
        "Z4J_HOME": str(home),
        "Z4J_DATABASE_URL": database_url or own_database,
        # In other environments cookies are Secure, and a login over plain HTTP fails.
        "Z4J_ENVIRONMENT": "dev",
    }


class Brain(BrainApi):
    """A brain process, and a REST session as its administrator.

    Use the object as a context manager, or call ``start`` and ``stop``.
    A brain that was stopped or killed can be started again, with the same directory and port.

    :param home: the brain's directory, created with mode 0700.
    :param port: the port; by default an unused port.
    :param environment: additional variables, for example ``Z4J_COMMAND_TIMEOUT_SECONDS``.
    :param database_url: a database such as ``postgresql+asyncpg://user:password@host/name``; by
        default a file in ``home``. For a given database, ``environment`` must contain
        :data:`SECRETS`.
    """

    email = "admin@example.test"

    def __init__(
        self,
        home: Path,
        *,
        port: int = 0,
        environment: Mapping[str, str] | None = None,
        database_url: str | None = None,
    ) -> None:
        self.home = home
        self.port = port or free_port()
        self.password = generate_password()
        self.log = home / "brain.log"
        self._extra = dict(environment or {})
        self._database_url = database_url
        self._service: Service | None = None
        super().__init__(f"http://127.0.0.1:{self.port}")

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._service is not None and self._service.running

    @property
    def pid(self) -> int:
        """The process id; raises ``HarnessError`` before ``start``."""
        return self._require_service().pid

    @property
    def database_url(self) -> str:
        """The URL of the brain's database."""
        return brain_environment(self.home, self._database_url)["Z4J_DATABASE_URL"]

    def start(self, timeout: float = _BOOT_TIMEOUT) -> None:
        """Start the process, wait until it is healthy (3 to 5 s with a new home), and log in.

        :param timeout: maximum seconds until the brain is healthy.
        """
        self._service = self._service or self._build_service()
        self._service.spawn(self.healthy, timeout)
        self.login(self.email, self.password)

    def stop(self, timeout: float = 20.0) -> None:
        """Stop the process with SIGTERM. The brain closes all sessions with code 1012.

        :param timeout: maximum seconds until the process exits. The process waits for running
            long-polls. After the timeout, the process is killed with SIGKILL.
        """
        self.close()
        if self._service:
            self._service.stop(timeout)

    def kill(self) -> None:
        """Kill the process with SIGKILL. The connections of agents are reset."""
        self.close()
        if self._service:
            self._service.kill()

    def restart(self) -> None:
        """Stop the process and start it again with the same data."""
        self.stop()
        self.start()

    def wait(self) -> None:
        """Wait until the process exits."""
        self._require_service().wait()

    def _build_service(self) -> Service:
        script = brain_command()
        if script is None:
            raise HarnessError(
                "the brain is not installed in this environment: pip install 'z4j-bare[demo]'"
            )
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {
            **brain_environment(self.home, self._database_url),
            "Z4J_BOOTSTRAP_ADMIN_EMAIL": self.email,
            "Z4J_BOOTSTRAP_ADMIN_PASSWORD": self.password,
            **self._extra,
        }
        command = [str(script), "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        command.append("--workers=1")  # several processes would share the sessions of the agents
        return Service("the brain", command, environment=environment, cwd=self.home, log=self.log)

    def _require_service(self) -> Service:
        if self._service is None:
            raise HarnessError("the brain was not started")
        return self._service

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: object, *_exc_info: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()
