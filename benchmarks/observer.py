"""The observers of a worker. They count the worker's tasks that have arrived at the other end."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from z4j_bare.demo.brain import free_port
from z4j_bare.demo.process import HarnessError, Service, clean_environment
from z4j_bare.demo.worker import worker_environment

if TYPE_CHECKING:
    from benchmarks.peers import Peers
    from z4j_bare.demo.rest import BrainApi

INSIDE = Path(__file__).with_name("inside")

#: Seconds between two scrapes of the metrics.
SCRAPE_INTERVAL = 5.0

#: Maximum seconds until a sink or the metrics server listens, and until a scrape is complete.
_READY_TIMEOUT = 30.0

#: Matches the number of successful runs in the metrics of a worker.
_METRIC = re.compile(
    r'^celery_task_succeeded_total\{[^}]*name="bench\.nap"[^}]*\} (\S+)', re.MULTILINE
)


class Observer:
    """The base class of observers. Itself, it stands for a worker that nothing observes.

    ``counts_tasks`` and ``counts_failures`` say whether each successful and each failed task
    arrives somewhere. ``launcher`` is a command that starts the worker's command, and ``options``
    are further options of the worker.
    """

    counts_tasks = False
    counts_failures = False
    launcher: Sequence[str] = ()
    options: Sequence[str] = ()

    @contextmanager
    def open(self, home: Path) -> Iterator[None]:
        """Start the other end. ``home`` is the directory of the trial."""
        del home
        yield

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables of the worker's environment."""
        del home
        return {"BENCH_SET_UP": ""}

    def succeeded(self) -> int:
        """Return the number of successful tasks that have arrived."""
        return 0

    def failed(self) -> int:
        """Return the number of failed tasks that have arrived."""
        return 0

    def check(self, tasks: int) -> None:
        """Raise ``HarnessError`` if fewer than ``tasks`` successful tasks have arrived."""
        if self.counts_tasks and self.succeeded() < tasks:
            raise HarnessError(f"only {self.succeeded()} of {tasks} successful tasks have arrived")


class Agent(Observer):
    """The z4j agent, in a project of its own on the real brain."""

    counts_tasks = True
    counts_failures = True

    def __init__(self, peers: Peers, title: str) -> None:
        self._credentials = peers.new_agent(title)
        self._shared = peers.brain
        self._brain: BrainApi = peers.brain

    @contextmanager
    def open(self, home: Path) -> Iterator[None]:
        """Log in with a separate session, because a thread polls the rows of each worker."""
        del home
        with closing(self._shared.clone()) as self._brain:
            yield

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that the agent reads."""
        return {"BENCH_SET_UP": "agent", **self._credentials.env(home / "agent")}

    def succeeded(self) -> int:
        """Return how many tasks the brain shows as succeeded."""
        return self._count("success")

    def failed(self) -> int:
        """Return how many tasks the brain shows as failed."""
        return self._count("failure")

    def _count(self, state: str) -> int:
        states = self._brain.stats(self._credentials.project).get("tasks_by_state") or {}
        return int(states.get(state, 0))


class ScrapedAgent(Agent):
    """The agent. Its metrics are read every :data:`SCRAPE_INTERVAL`, as Prometheus reads them.

    :param python: the interpreter of ``z4j-bare metrics``, with ``prometheus_client``.
    """

    def __init__(self, peers: Peers, title: str, python: str) -> None:
        super().__init__(peers, title)
        self._python = python
        self._stop = threading.Event()
        self._scrapes = 0

    @contextmanager
    def open(self, home: Path) -> Iterator[None]:
        """Start the metrics server and the thread that reads it."""
        (home / "agent").mkdir(mode=0o700)
        self._url = f"http://127.0.0.1:{free_port()}/metrics"
        address = self._url.removeprefix("http://").removesuffix("/metrics")
        server = Service(
            "the metrics server",
            [self._python, "-m", "z4j_bare", "metrics", "--listen", address],
            environment=worker_environment({"Z4J_HOME": str(home / "agent")}, self._python),
            cwd=home,
            log=home / "metrics.log",
        )
        scraper = threading.Thread(target=self._scrape, daemon=True)
        with super().open(home), server:
            server.spawn(lambda: "serving" in server.output(), _READY_TIMEOUT)
            scraper.start()
            try:
                yield
            finally:
                self._stop.set()
                scraper.join(_READY_TIMEOUT)

    def check(self, tasks: int) -> None:
        """Also compare the metrics with the tasks that ran."""
        super().check(tasks)
        found = _METRIC.search(_get(self._url))
        if not found or float(found[1]) != tasks or not self._scrapes:
            raise HarnessError(
                f"after {self._scrapes} scrapes the metrics show {found and found[1]} of {tasks}"
                " successful tasks"
            )

    def _scrape(self) -> None:
        while not self._stop.wait(SCRAPE_INTERVAL):
            self._scrapes += bool(_METRIC.search(_get(self._url)))


class Library(Observer):
    """A monitoring library, or Celery's events, with a sink process that counts.

    :param python: the interpreter of the sink, with the packages that decode the protocol.
    :param protocol: the protocol of the sink, see ``bench_sink.py``.
    :param set_up: the name in ``bench_libraries.py``; empty if the launcher sets the library up.
    :param sends_successes: whether each successful task arrives at the sink.
    """

    counts_failures = True

    def __init__(
        self,
        python: str,
        protocol: str,
        *,
        set_up: str = "",
        sends_successes: bool = True,
        launcher: Sequence[str] = (),
        options: Sequence[str] = (),
        broker: str = "",
    ) -> None:
        self.counts_tasks = sends_successes
        self.launcher, self.options = launcher, options
        self._set_up = set_up
        self._command = [python, str(INSIDE / "bench_sink.py"), protocol]
        self._broker = [broker] if broker else []
        self._url = ""

    @contextmanager
    def open(self, home: Path) -> Iterator[None]:
        """Start the sink."""
        port = home / "sink.port"
        sink = Service(
            "the sink",
            [*self._command, str(port), *self._broker],
            environment=clean_environment(),
            cwd=home,
            log=home / "sink.log",
        )
        with sink:
            sink.spawn(port.exists, _READY_TIMEOUT)
            self._url = f"http://127.0.0.1:{port.read_text()}"
            yield

    def environment(self, home: Path) -> dict[str, str]:
        """Return the address of the sink for each library."""
        del home
        return {
            "BENCH_SET_UP": self._set_up,
            "BENCH_SINK": self._url,
            "DD_TRACE_AGENT_URL": self._url,
            "DD_SERVICE": "bench",
        }

    def succeeded(self) -> int:
        """Return how many successful tasks have arrived at the sink."""
        return self._count()["succeeded"]

    def failed(self) -> int:
        """Return how many failed tasks have arrived at the sink."""
        return self._count()["failed"]

    def _count(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(_get(f"{self._url}/count"))
        return found


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_READY_TIMEOUT) as answer:  # noqa: S310 - loopback
        text: str = answer.read().decode()
        return text
