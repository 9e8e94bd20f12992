"""Hosts of the agent that cost a second to start: ``apps/embedded.py`` in a process of its own, in each mode."""

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

#: Seconds after which something that should have happened has not.
PATIENCE = 90.0


class Host(Service):
    """A process in ``mode`` whose agent is the one of ``credentials``, as a context manager.

    ``home`` is its own directory, and where its log is; ``environment`` comes on top of the credentials'. It is waited for
    with ``wait_installed``, so that several can start at once.
    """

    def __init__(self, mode, credentials, home, **environment):
        self.name = f"{mode}-{environment.get('Z4J_TRANSPORT', 'auto')}"
        self.credentials = credentials
        self._door = socket.create_server(("127.0.0.1", 0))
        self._door.settimeout(PATIENCE)
        self._lines = None
        self._produced = Counter()
        home.mkdir(parents=True, exist_ok=True)
        super().__init__(
            f"the {self.name} host",
            [sys.executable, str(APP), mode, str(self._door.getsockname()[1])],
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
        self.spawn(lambda: True, PATIENCE)
        return self

    def __exit__(self, *exc):
        if self._lines is not None:
            self.leave()
        self._door.close()
        super().__exit__(*exc)

    def wait_installed(self):
        """Wait until its agent is installed."""
        sock, _ = self._door.accept()
        with sock:
            sock.settimeout(PATIENCE)
            self._lines = sock.makefile("rw")

    def leave(self):
        """Have it stop its agent and end, and return the exit code."""
        self._lines.close()
        self._lines = None
        return self.wait()

    def come_back(self, **environment):
        """Start it again after ``leave``, on the same state, with these changes."""
        self.environment.update(environment)
        self.spawn(lambda: True, PATIENCE)
        self.wait_installed()

    def ask(self, do, **what):
        """Have it do something, and return the answer: the host is alive and not held up."""
        self._lines.write(json.dumps({"do": do, **what}) + "\n")
        self._lines.flush()
        return json.loads(self._lines.readline())

    def produce(self, lot, count, seconds):
        """Have it record ``count`` more events of the lot ``<lot>-<name>`` within some seconds, beside everything else."""
        self.ask(
            "produce",
            lot=f"{lot}-{self.name}",
            first=self._produced[lot],
            count=count,
            seconds=seconds,
        )
        self._produced[lot] += count

    def produced(self):
        """Wait until everything asked for has been recorded."""
        self.until(lambda stats: not stats["busy"], "events")

    def settled(self):
        """Whether the brain has acknowledged everything that was produced here."""
        stats = self.ask("stats")
        return (
            not stats["busy"]
            and stats["produced"] == stats["acked"]
            and not stats["buffered"]
            and not stats["lost"]
        )

    def settle(self):
        """Wait for that."""
        self.until(lambda _stats: self.settled(), "acks")

    def until(self, condition, what):
        """Wait until ``condition(stats)`` holds; the error says what they are."""
        try:
            until(lambda: condition(self.ask("stats")), what, timeout=PATIENCE)
        except HarnessError as error:
            raise AssertionError(f"{self.title}, {error}: {self.ask('stats')}") from error

    def delivered(self, brain, lot):
        """Whether every event of the lot is in the brain, once."""
        rows = brain.events(self.credentials.project, "stub", f"{lot}-{self.name}")
        return sorted(row["payload"]["number"] for row in rows) == list(range(self._produced[lot]))


@contextmanager
def start_hosts(brain, homes, transports=("auto",), **environment):
    """A host in each mode over each transport, in one new project, each behind a ``proxy`` of its own and with a session.

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
