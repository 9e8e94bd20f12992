"""One worker, one batch of tasks: what it cost until the tasks were done, and until the brain knew it all."""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import z4j_bare
from benchmarks.cpu import Meter, Reading
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import Worker

if TYPE_CHECKING:
    from benchmarks.peers import Peers
    from z4j_bare.demo.rest import Credentials

INSIDE = Path(__file__).with_name("inside")
VARIANTS = ("off", "ours", "existing")

_READY_SECONDS = 60.0
_WARM_TASKS = 300
_SAMPLE = 0.1
_STALLED = 15.0  # seconds without a new row after which an agent counts as having lost the rest
_PROBES = 10
_PROBE_PATIENCE = 20.0


@dataclass(frozen=True)
class Plan:
    """What every trial of a run does alike.

    ``window``: seconds after the last task during which every variant is watched. ``core``: the processor that the worker
    has to itself; the brain would otherwise spoil its caches, at the expense of whichever agent keeps the brain busy.
    """

    tasks: int = 2000
    arguments: str = "none"
    concurrency: int = 100
    window: float = 10.0
    patience: float = 120.0
    loglevel: str = "WARNING"
    attribute: bool = False
    ticker: bool = True
    probes: int = _PROBES
    core: int | None = None


@dataclass
class Trial:
    """What one worker did. Seconds, bytes; ``samples`` is (seconds since release, CPU seconds since release)."""

    variant: str
    pool: str
    tasks: int
    tasks_seconds: float = 0.0
    cpu_tasks: float = 0.0
    cpu_window: float = 0.0
    cpu_end: float = 0.0
    idle: float = 0.0
    end_seconds: float = 0.0
    rows: int | None = None
    rss: int = 0
    lateness: list[float] = field(default_factory=list)
    row_delays: list[float] = field(default_factory=list)
    attribution: dict[str, list[float]] = field(default_factory=dict)
    load: float = 0.0

    def to_object(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


class Stage:
    """Runs one trial; see ``run``."""

    def __init__(self, peers: Peers, plan: Plan, variant: str, pool: str, python: str) -> None:
        self._peers, self._plan, self._variant, self._pool, self._python = peers, plan, variant, pool, python
        title = f"{pool}-{variant}"
        self._home = peers.home / f"{title}-{time.monotonic_ns()}"
        self._home.mkdir()
        self._agent: Credentials | None = None if variant == "off" else peers.new_agent(title)
        self._samples: list[Reading] = []
        self._row_times: list[tuple[float, int]] = []

    def run(self) -> Trial:
        """Start the worker, warm it up, release the tasks, watch, probe, stop."""
        self._peers.purge()
        try:
            return self._run()
        except HarnessError as error:
            log = self._home / "worker.log"
            tail = log.read_text(errors="replace")[-600:] if log.exists() else ""
            raise HarnessError(f"{error}\n{tail}") from None

    def _run(self) -> Trial:
        with self._worker() as worker:
            worker.spawn((self._home / "ready").exists, _READY_SECONDS)
            self._meter = Meter(worker.pid)
            self._warm_up()
            trial = self._measure()
            if self._agent:
                trial.row_delays = [self._probe() for _ in range(self._plan.probes)]
            worker.stop()
        trial.lateness = self._lateness()
        trial.attribution = self._attribution()
        return trial

    def _worker(self) -> Worker:
        environment = {
            "BENCH_HOME": str(self._home),
            "BENCH_BROKER": self._peers.broker(),
            "BENCH_VARIANT": self._variant,
            "BENCH_TICKER": str(int(self._plan.ticker)),
            "BENCH_ATTRIBUTE": str(int(self._plan.attribute)),
            "BENCH_CORE": "" if self._plan.core is None else str(self._plan.core),
            "PYTHONPATH": self._search_path(),
            "PYTHONWARNINGS": "ignore",
            **(self._agent.env(self._home / "agent") if self._agent else {}),
        }
        return Worker(
            "bench_app",
            pool=self._pool,
            log=self._home / "worker.log",
            environment=environment,
            concurrency=2 if self._pool == "prefork" else self._plan.concurrency,
            name=f"{self._variant}@bench",
            options=["--loglevel", self._plan.loglevel],
            python=self._python,
        )

    def _search_path(self) -> str:
        folders = [str(INSIDE)]
        if self._python == sys.executable:
            folders.append(str(Path(z4j_bare.__file__).parents[1]))
        return os.pathsep.join(folders)

    def _warm_up(self) -> None:
        """Pay for first times (imports, connections, caches), and let the agent send what came of it."""
        self._release(_WARM_TASKS)
        until(lambda: len(self._ends()) >= _WARM_TASKS, "the warm-up tasks", timeout=60.0)
        if self._agent:
            self._await_rows(_WARM_TASKS, self._plan.patience)
        time.sleep(2.0)
        self._before = len(self._ends())
        self._rows_before = self._rows()

    def _measure(self) -> Trial:
        plan = self._plan
        self._peers.stage(plan.tasks, plan.arguments)
        began = self._meter.read()
        self._samples = [began]
        self._peers.release()
        self._watch(lambda: len(self._ends()) >= self._before + plan.tasks, plan.patience, must=True)
        last = self._ends()[-1]
        until_rows = self._expect_rows(plan.tasks)
        self._watch(lambda: time.monotonic() > last + plan.window, plan.window + 1.0)
        self._watch(until_rows, plan.patience)
        ended = self._row_times[-1][0] if self._row_times else last
        self._span = (began.at, max(last, ended))
        return Trial(
            self._variant,
            self._pool,
            plan.tasks,
            tasks_seconds=last - began.at,
            cpu_tasks=self._cpu_at(last) - began.cpu,
            cpu_window=self._cpu_at(last + plan.window) - began.cpu,
            cpu_end=self._cpu_at(max(last, ended)) - began.cpu,
            idle=(self._samples[-1].cpu - self._cpu_at(last + 2.0)) / max(0.1, self._samples[-1].at - last - 2.0),
            end_seconds=max(last, ended) - began.at,
            rows=None if not self._agent else self._rows() - self._rows_before,
            rss=self._samples[-1].rss,
            load=os.getloadavg()[0],
        )

    def _watch(self, done: Any, timeout: float, *, must: bool = False) -> None:
        """Sample until ``done()`` or ``timeout``; raise for a time-out that must not be."""
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                if must:
                    raise HarnessError(f"the {self._title()} did not come to its end", log=self._home / "worker.log")
                return
            time.sleep(_SAMPLE)
            self._samples.append(self._meter.read())
        self._samples.append(self._meter.read())

    def _expect_rows(self, tasks: int) -> Any:
        """Return a check: whether the brain has all rows, or has had no new one for long."""
        if not self._agent:
            return lambda: True

        def done() -> bool:
            now = time.monotonic()
            if self._row_times and now - self._row_times[-1][0] < 0.5 and self._row_times[-1][1] < tasks:  # spare the brain
                return False
            found = self._rows() - self._rows_before
            if not self._row_times or found > self._row_times[-1][1]:
                self._row_times.append((now, found))
            return found >= tasks or now - self._row_times[-1][0] > _STALLED

        return done

    def _cpu_at(self, moment: float) -> float:
        """Return the CPU clock at a moment, interpolated between the two samples around it."""
        before = self._samples[0]
        for sample in self._samples:
            if sample.at >= moment:
                span = sample.at - before.at
                return before.cpu + (sample.cpu - before.cpu) * ((moment - before.at) / span if span else 1.0)
            before = sample
        return before.cpu

    def _release(self, count: int) -> None:
        self._peers.stage(count, self._plan.arguments)
        self._peers.release()

    def _rows(self) -> int:
        """Return how many tasks the brain shows as succeeded; 0 without an agent."""
        if not self._agent:
            return 0
        return succeeded(self._peers.brain.stats(self._agent.project))

    def _await_rows(self, expected: int, timeout: float) -> None:
        from benchmarks.peers import wait_count

        wait_count(self._rows, expected, quiet=_STALLED, timeout=timeout)

    def _probe(self) -> float:
        """Return the seconds from a single task's end to its row in the brain, on an idle worker; ``inf`` if never."""
        rows, ends = self._rows(), len(self._ends())
        self._release(1)
        deadline = time.monotonic() + _PROBE_PATIENCE
        while time.monotonic() < deadline:
            time.sleep(0.01)
            if self._rows() > rows:
                return time.monotonic() - self._ends()[ends]
        return float("inf")

    def _ends(self) -> list[float]:
        moments = array("d")
        for tape in self._home.glob("ends.*"):
            found = array("d")
            found.frombytes(tape.read_bytes())
            moments.extend(moment for moment in found if moment)
        return sorted(moments)

    def _lateness(self) -> list[float]:
        """Return how late the ticker woke while the tasks ran and their rows were sent; sorted."""
        values = array("d")
        for tape in self._home.glob("ticks.*"):
            values.frombytes(tape.read_bytes())
        began, ended = self._span
        return sorted(late for at, late in zip(values[::2], values[1::2], strict=True) if began <= at <= ended)

    def _attribution(self) -> dict[str, list[float]]:
        for path in self._home.glob("attribution.*.json"):
            found: dict[str, list[float]] = json.loads(path.read_text())
            return found
        return {}

    def _title(self) -> str:
        return f"{self._pool} worker ({self._variant})"


def succeeded(stats: dict[str, Any]) -> int:
    """Return the number of succeeded tasks in the brain's ``stats``."""
    states = stats.get("tasks_by_state") or {}
    return int(states.get("success", 0))
