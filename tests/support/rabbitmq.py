"""A private RabbitMQ node, from the system's package, with files and ports of its own."""

import json
import os
import secrets
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote

from z4j_bare.demo.brain import free_port
from z4j_bare.demo.process import HarnessError, Service, clean_environment, until

#: Directory of the programs in the packages of Debian and Red Hat. The programs of the same names
#: on PATH are wrappers, which demand root and switch to the user of the system's own node.
PROGRAMS = Path("/usr/lib/rabbitmq/bin")

USER = "z4j"

#: Maximum seconds until a started node accepts connections. It takes 4 s on an idle machine.
START_TIMEOUT = 60.0

#: The greeting of a client of AMQP 0-9-1, which a node that is ready answers with a frame.
GREETING = b"AMQP\x00\x00\x09\x01"


def find_program(name):
    """Return the path of one of RabbitMQ's programs, or ``None`` if it is not installed."""
    return shutil.which(name, path=f"{PROGRAMS}{os.pathsep}{os.environ.get('PATH', '')}")


class RabbitNode(Service):
    """A node on the loopback interface. Its queues survive :meth:`kill` and :meth:`restart`.

    As a context manager it is started, and removed at the end.

    :param home: a new directory.
    """

    def __init__(self, home):
        self.home = home
        self.port = free_port()
        self._password = secrets.token_hex(16)
        self._stack = ExitStack()
        self._write_files()
        mapper = {"ERL_EPMD_PORT": str(free_port()), "ERL_EPMD_ADDRESS": "127.0.0.1"}
        environment = {
            **clean_environment(),
            **mapper,
            "HOME": str(home),  # the nodes and tools of a home share a secret file
            "LC_ALL": "C.UTF-8",
            "RABBITMQ_NODENAME": f"z4j-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": str(home / "environment.conf"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home),
            "RABBITMQ_LOGS": "-",
        }
        super().__init__(
            "RabbitMQ",
            [find_program("rabbitmq-server")],
            environment=environment,
            cwd=home,
            log=home / "rabbitmq.log",
        )
        # The node would start one that outlives it.
        self._mapper = Service(
            "epmd", ["epmd"], environment=environment, cwd=home, log=home / "epmd.log"
        )

    def __enter__(self):
        self._stack.enter_context(self._mapper)
        self._mapper.spawn(lambda: True, START_TIMEOUT)
        self._stack.callback(self.kill)
        try:
            self.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def url(self, vhost="/", *, password=None):
        """Return the URL of a virtual host."""
        password = password or self._password
        return f"amqp://{USER}:{password}@127.0.0.1:{self.port}/{quote(vhost, safe='')}"

    def start(self):
        """Start the node and wait until it accepts connections."""
        self.spawn(self._answers, START_TIMEOUT)

    def restart(self):
        """Stop the node as its own tool does, and start it again."""
        self.control("stop")
        until(lambda: not self.running, "the end of RabbitMQ", timeout=30)
        self.start()

    def control(self, *arguments):
        """Run ``rabbitmqctl`` and return what it prints. It takes a second or two."""
        done = subprocess.run(
            [find_program("rabbitmqctl"), *arguments],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise HarnessError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def add_vhost(self, name):
        """Create a virtual host, which the tests' user may use, and return its URL."""
        self.control("add_vhost", name)
        self.control("set_permissions", "-p", name, USER, ".*", ".*", ".*")
        return self.url(name)

    def _write_files(self):
        user = {"name": USER, "password": self._password, "tags": "administrator"}
        everything = dict.fromkeys(("configure", "write", "read"), ".*")
        definitions = {
            "users": [user],
            "vhosts": [{"name": "/"}],
            "permissions": [{"user": USER, "vhost": "/", **everything}],
        }
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "load_definitions": str(self.home / "definitions.json"),
            # With little space on the disk a node blocks all publishers.
            "disk_free_limit.absolute": "1MB",
        }
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self.home / "rabbitmq.conf").write_text(lines)
        (self.home / "definitions.json").write_text(json.dumps(definitions))
        (self.home / "environment.conf").write_text("")
        (self.home / "plugins").write_text("[].\n")

    def _answers(self):
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
            client.settimeout(1)
            client.sendall(GREETING)
            return client.recv(1) == b"\x01"  # the type of a frame with a method
        return False
