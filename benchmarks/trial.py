"""One worker of one variant, and the cost of its batches until the brain has all their rows."""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import z4j_bare
from benchmarks.cpu import Meter, Reading
from benchmarks.observer import INSIDE, Agent, Observer
from benchmarks.peers import FAILING_TASK, TASK, wait_count
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.peers import Peers

_READY_SECONDS = 60.0
_WARM_TASKS = 300
_GATE_SECONDS = 60.0
_STALLED = 15.0  # seconds without a new row after which the missing rows count as lost
_PROBES = 10
_PROBE_TIMEOUT = 20.0


@dataclass(frozen=True)
class Plan:
    """The parameters that all trials of a run share.

    ``tasks`` is the number of tasks of one batch. ``core`` is the processor of all workers. If the
    brain ran on it too, the brain would evict the workers' caches, and an agent that keeps the
    brain busy would seem more expensive. ``baseline`` is the directory of the other checkout.
    ``failures`` is the number of tasks that raise an exception before the first batch. These tasks
    must arrive at the observer's end.
    """

    tasks: int = 2000
    arguments: str = "none"
    concurrency: int = 100
    children: int = 2
    row_timeout: float = 120.0
    loglevel: str = "WARNING"
    attribute: bool = False
    probes: int = _PROBES
    core: int | None = None
    baseline: str = ""
    failures: int = 0


@dataclass
class Trial:
    """The measurements of one worker over all its batches, in seconds and bytes.

    ``cpu`` is counted from the release of each batch until its last row; ``tasks_seconds`` end with
    the last task. ``idle_host_cpu`` is what the worker without an agent used in the same time,
    after its own last task. ``idle`` is the CPU per second at all other times. ``hub_lags`` come
    from one more batch, because the ticker that measures them costs more than an idle agent.
    """

    variant: str
    pool: str
    batches: int = 0
    tasks: int = 0
    tasks_seconds: float = 0.0
    end_seconds: float = 0.0
    cpu: float = 0.0
    batch_cpu: list[float] = field(default_factory=list)
    idle_host_cpu: float = 0.0
    idle: float = 0.0
    rows: int | None = None
    rss: int = 0
    pss: int = 0
    hub_lags: list[float] = field(default_factory=list)
    row_delays: list[float] = field(default_factory=list)
    attribution: dict[str, list[float]] = field(default_factory=dict)
    load: float = 0.0

    def to_object(self) -> dict[str, Any]:
        """Return the trial as JSON types."""
        return asdict(self)


class BenchWorker:
    """A warm worker that waits for its batches.

    :param database: the Redis database of the worker's broker; each worker of a round has another.
    :param observer: what observes the worker; by default the agent, or nothing for variant "off".
    """

    #: The module of the Celery application.
    APP = "bench_app"

    def __init__(
        self,
        peers: Peers,
        plan: Plan,
        variant: str,
        pool: str,
        python: str,
        database: int = 0,
        observer: Observer | None = None,
    ) -> None:
        self._peers, self._plan, self._variant, self._pool, self._python = (
            peers,
            plan,
            variant,
            pool,
            python,
        )
        self._database = database
        title = f"{pool}-{variant}"
        self._home = peers.home / f"{title}-{time.monotonic_ns()}"
        self._home.mkdir()
        if observer is None:
            observer = Observer() if variant == "off" else Agent(peers, title)
        self._observer = observer
        self.trial = Trial(variant, pool)
        self._span = (0.0, 0.0)
        self._agentless: BenchWorker | None = None
        self._idle_host_cpu = 0.0

    def run(self) -> Trial:
        """Run one batch from start to end."""
        with self.open():
            run_in_step(self._peers, self._plan, [self])
            self.measure_idle()
        return self.trial

    @contextmanager
    def open(self) -> Iterator[None]:
        """Start the worker and warm it up; ``trial`` is complete when the block has ended."""
        with self._observer.open(self._home), self._worker() as worker:
            with self._explained():
                worker.spawn((self._home / "ready").exists, _READY_SECONDS)
                self.meter = Meter(worker.pid)
                self._warm_up()
                self._opened = self.meter.read()
            yield
            worker.stop()
        # Only the lags while the tasks ran and their rows were sent.
        self.trial.hub_lags = self.lags_between(*self._span)
        self.trial.attribution = self._attribution()

    def batch(self, messages: list[bytes], gate: Barrier) -> None:
        """Release the tasks when all workers are at the gate.

        Return when the brain has their rows.
        """
        trial, rows = self.trial, self._rows()
        with self._explained():
            began, last, ended = self._tasks(messages, gate)
        if self._observer.counts_tasks:
            trial.rows = (trial.rows or 0) + self._rows() - rows
        trial.batches += 1
        trial.tasks += len(messages)
        trial.tasks_seconds += last - began.at
        trial.end_seconds += ended.at - began.at
        trial.cpu += ended.cpu - began.cpu
        trial.batch_cpu.append(ended.cpu - began.cpu)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add the end of the worker's log to a ``HarnessError``."""
        try:
            yield
        except HarnessError as error:
            log = self._home / "worker.log"
            tail = log.read_text(errors="replace")[-600:] if log.exists() else ""
            raise HarnessError(f"{self._pool}, {self._variant}: {error}\n{tail}") from None

    def compare_with(self, agentless: BenchWorker | None) -> None:
        """Also read the CPU clock of the worker without an agent at the end of each batch."""
        self._agentless = None if agentless is self else agentless

    def add_idle_host_cpu(self) -> None:
        """Add the CPU that the worker without an agent used from its last task to our last row."""
        if self._agentless is not None:
            used = self._idle_host_cpu - self._agentless.marked.cpu
            self.trial.idle_host_cpu += max(0.0, used)

    def start_ticker(self) -> None:
        """Start the ticker; from now on the worker's CPU is not measured."""
        (self._home / "tick").touch()
        until(lambda: any(self._home.glob("ticks.*")), "the ticker", timeout=_READY_SECONDS)

    def measure_lag(self) -> None:
        """Release one more batch while the ticker runs."""
        began, _, ended = self._tasks(
            self._peers.prepare(self._plan.tasks, self._plan.arguments), Barrier(1)
        )
        self._span = (began.at, ended.at)

    def _tasks(self, messages: list[bytes], gate: Barrier) -> tuple[Reading, float, Reading]:
        """Release the tasks; return the readings at release and last row, and the last task's end.

        The order is: release, end of the last task, last row.
        """
        plan, ends, rows = self._plan, len(self._ends()), self._rows()
        gate.wait(_GATE_SECONDS)
        began = self.meter.read()
        self._peers.release(self._database, messages)
        done = f"the {len(messages)} tasks of a {self._pool} worker ({self._variant})"
        until(lambda: len(self._ends()) >= ends + len(messages), done, timeout=plan.row_timeout)
        ended = self._await_rows(rows + len(messages))
        return began, self._ends()[-1], ended

    def measure_idle(self) -> None:
        """Measure the worker after its batches: idle CPU, memory, delay of single rows."""
        trial, now = self.trial, self.meter.read()
        trial.idle = (now.cpu - self._opened.cpu - trial.cpu) / max(
            0.1, now.at - self._opened.at - trial.end_seconds
        )
        trial.rss = now.rss
        trial.pss = self.meter.pss()
        trial.load = os.getloadavg()[0]
        if self._plan.probes and self._observer.counts_tasks:
            trial.row_delays = [self._probe() for _ in range(self._plan.probes)]

    def check_delivery(self) -> None:
        """Raise ``HarnessError`` if a task of this worker has not arrived at the other end."""
        with self._explained():
            self._observer.check(_WARM_TASKS + self.trial.tasks)

    def _worker(self) -> Worker:
        environment = {
            "BENCH_HOME": str(self._home),
            "BENCH_BROKER": self._peers.broker(self._database),
            "BENCH_VARIANT": self._variant,
            "BENCH_POOL": self._pool,
            "BENCH_ATTRIBUTE": str(int(self._plan.attribute)),
            "BENCH_CORE": "" if self._plan.core is None else str(self._plan.core),
            "PYTHONPATH": self._search_path(),
            "PYTHONWARNINGS": "ignore",
            **self._observer.environment(self._home),
        }
        worker = Worker(
            self.APP,
            pool=self._pool,
            log=self._home / "worker.log",
            environment=environment,
            concurrency=self._plan.children if self._pool == "prefork" else self._plan.concurrency,
            name=f"{self._variant}@bench",
            options=["--loglevel", self._plan.loglevel, *self._observer.options],
            python=self._python,
        )
        worker.command[:0] = self._observer.launcher
        return worker

    def _search_path(self) -> str:
        folders = [str(INSIDE)]
        if self._variant == "baseline":
            folders.append(self._plan.baseline)
        elif self._python == sys.executable:
            folders.append(str(Path(z4j_bare.__file__).parents[1]))
        return os.pathsep.join(folders)

    def _warm_up(self) -> None:
        """Run tasks for imports, connections and caches, and wait until the agent has sent them."""
        self._release(_WARM_TASKS)
        until(lambda: len(self._ends()) >= _WARM_TASKS, "the warm-up tasks", timeout=60.0)
        self._await_rows(_WARM_TASKS)
        if failures := self._plan.failures:
            self._release(failures, FAILING_TASK)
            done = f"the failed tasks of a {self._pool} worker ({self._variant})"
            until(lambda: len(self._ends()) >= _WARM_TASKS + failures, done, timeout=60.0)
            if self._observer.counts_failures:
                until(
                    lambda: self._observer.failed() >= failures,
                    f"the arrival of {done}",
                    timeout=self._plan.row_timeout,
                    interval=0.5,
                )
        time.sleep(2.0)

    def _await_rows(self, expected: int) -> Reading:
        """Wait until the brain has ``expected`` rows, or no new one for ``_STALLED`` seconds."""
        if self._observer.counts_tasks:
            wait_count(
                self._rows,
                expected,
                quiet=_STALLED,
                timeout=self._plan.row_timeout,
                on_change=self._mark,
            )
        else:
            self._mark()
        return self.marked

    def _mark(self) -> None:
        self.marked = self.meter.read()
        if self._agentless is not None:
            self._idle_host_cpu = self._agentless.meter.read().cpu

    def _release(self, count: int, task: str = TASK) -> None:
        self._peers.release(self._database, self._peers.prepare(count, self._plan.arguments, task))

    def _rows(self) -> int:
        """Return how many successful tasks have arrived at the other end; 0 without an agent."""
        return self._observer.succeeded()

    def _probe(self) -> float:
        """Return the seconds from one task's end to its row on an idle worker.

        ``inf`` after a time-out.
        """
        rows, ends = self._rows(), len(self._ends())
        self._release(1)
        deadline = time.monotonic() + _PROBE_TIMEOUT
        while time.monotonic() < deadline:
            time.sleep(0.01)
            if self._rows() > rows:
                return time.monotonic() - self._ends()[ends]
        return float("inf")

    def _ends(self) -> list[float]:
        moments = array("d")
        for samples in self._home.glob("ends.*"):
            found = array("d")
            found.frombytes(samples.read_bytes())
            moments.extend(moment for moment in found if moment)
        return sorted(moments)

    def lags_between(self, began: float, ended: float) -> list[float]:
        """Return the ticker's lags in a span of monotonic time, sorted."""
        values = array("d")
        for samples in self._home.glob("ticks.*"):
            values.frombytes(samples.read_bytes())
        return sorted(
            lag for at, lag in zip(values[::2], values[1::2], strict=True) if began <= at <= ended
        )

    def _attribution(self) -> dict[str, list[float]]:
        for path in self._home.glob("attribution.*.json"):
            found: dict[str, list[float]] = json.loads(path.read_text())
            return found
        return {}


def open_together(stack: ExitStack, workers: Sequence[BenchWorker]) -> None:
    """Start and warm up all workers at the same time; the exit of ``stack`` stops them."""
    with ThreadPoolExecutor(len(workers)) as starters:
        for starter in [starters.submit(stack.enter_context, worker.open()) for worker in workers]:
            starter.result()


def run_in_step(peers: Peers, plan: Plan, workers: Sequence[BenchWorker]) -> None:
    """Give all workers the same tasks at the same moment; return when the brain has their rows.

    The speed of a shared machine changes within a second by more than the measured differences.
    Such a change then affects all workers.
    """
    messages, gate = peers.prepare(plan.tasks, plan.arguments), Barrier(len(workers))
    agentless = next((worker for worker in workers if worker.trial.variant == "off"), None)
    for worker in workers:
        worker.compare_with(agentless)
    with ThreadPoolExecutor(len(workers)) as pollers:
        for poller in [pollers.submit(worker.batch, messages, gate) for worker in workers]:
            poller.result()
    for worker in workers:
        worker.add_idle_host_cpu()
