"""Processes that run ``apps/embedded.py``, which contains only an agent, in each mode."""

import json
import socket
import sys
import uuid
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

import z4j_bare
from tests.support.toxics import Proxy
from z4j_bare.demo.process import HarnessError, Service, clean_environment, until

MODES = ("threads", "gevent", "eventlet")
APP = Path(__file__).parents[1] / "e2e" / "apps" / "embedded.py"

#: Timeout of each awaited condition, in seconds.
TIMEOUT = 90.0


class Host(Service):
    """A process with the agent, as a context manager.

    Entering does not wait for the agent, so that several hosts can start concurrently;
    ``wait_installed`` does.

    :param mode: ``threads``, ``gevent`` or ``eventlet``.
    :param credentials: the agent's credentials.
    :param home: the process's directory, with its log.
    :param environment: variables in addition to those of the credentials.
    """

    def __init__(self, mode, credentials, home, **environment):
        self.name = f"{mode}-{environment.get('Z4J_TRANSPORT', 'auto')}"
        self.credentials = credentials
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TIMEOUT)
        self._connection = None
        self._produced = Counter()
        home.mkdir(parents=True, exist_ok=True)
        super().__init__(
            f"the {self.name} host",
            [sys.executable, str(APP), mode, str(self._listener.getsockname()[1])],
            environment={
                **clean_environment(),
                "PYTHONPATH": str(Path(z4j_bare.__file__).parents[1]),
                **credentials.env(home / "agent"),
                **environment,
            },
            cwd=home,
            log=home / "host.log",
        )

    def __enter__(self):
        self.spawn(lambda: True, TIMEOUT)
        return self

    def __exit__(self, *exc):
        if self._connection is not None:
            self.finish()
        self._listener.close()
        super().__exit__(*exc)

    def wait_installed(self):
        """Wait until the process has installed its agent."""
        sock, _ = self._listener.accept()
        with sock:
            sock.settimeout(TIMEOUT)
            self._connection = sock.makefile("rw")

    def finish(self):
        """Make the process stop its agent and exit, and return the exit code."""
        self._connection.close()
        self._connection = None
        return self.wait()

    def restart(self, **environment):
        """Start the process again after ``finish``, with the same state and changed variables."""
        self.environment.update(environment)
        self.spawn(lambda: True, TIMEOUT)
        self.wait_installed()

    def request(self, do, **arguments):
        """Call a method of the process and return its result."""
        self._connection.write(json.dumps({"do": do, **arguments}) + "\n")
        self._connection.flush()
        return json.loads(self._connection.readline())

    def produce(self, batch, count, seconds):
        """Record ``count`` more events of the batch ``<batch>-<name>`` in the background.

        :param seconds: the time over which the events are spread.
        """
        self.request(
            "produce",
            batch=f"{batch}-{self.name}",
            first=self._produced[batch],
            count=count,
            seconds=seconds,
        )
        self._produced[batch] += count

    def wait_produced(self):
        """Wait until all requested events are recorded."""
        self.until(lambda stats: not stats["busy"], "events")

    def all_acked(self):
        """Whether the brain has acknowledged all events of this process."""
        stats = self.request("stats")
        return (
            not stats["busy"]
            and stats["produced"] == stats["acked"]
            and not stats["buffered"]
            and not stats["lost"]
        )

    def wait_acked(self):
        """Wait until the brain has acknowledged all events of this process."""
        self.until(lambda _stats: self.all_acked(), "acks")

    def until(self, condition, what):
        """Wait until ``condition(stats)`` is true; the error contains the stats."""
        try:
            until(lambda: condition(self.request("stats")), what, timeout=TIMEOUT)
        except HarnessError as error:
            raise AssertionError(f"{self.title}, {error}: {self.request('stats')}") from error

    def delivered(self, brain, batch):
        """Whether the brain has each event of the batch exactly once."""
        rows = brain.events(self.credentials.project, "stub", f"{batch}-{self.name}")
        numbers = sorted(row["payload"]["number"] for row in rows)
        return numbers == list(range(self._produced[batch]))


@contextmanager
def start_hosts(brain, homes, transports=("auto",), **environment):
    """Yield connected hosts in a new project: one in each mode and over each transport.

    Each host connects through its own ``proxy``.

    :param homes: pytest's ``tmp_path_factory``.
    """
    project = f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)
    with ExitStack() as stack:
        hosts = []
        for mode, transport in product(MODES, transports):
            proxy = Proxy(brain.port)
            stack.callback(proxy.close)
            home = homes.mktemp(f"{mode}-{transport}")
            agent = brain.mint_agent(project, home.name)
            host = Host(
                mode, agent, home, Z4J_BRAIN_URL=proxy.url, Z4J_TRANSPORT=transport, **environment
            )
            host.proxy = proxy
            hosts.append(stack.enter_context(host))
        for host in hosts:
            host.wait_installed()
        for host in hosts:
            host.until(lambda stats: stats["sessions"], "a session")
        yield hosts
