"""Kills or stops a worker while the brain is away.

Measures when the next worker delivers the rows of the first.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.cpu import Meter
from benchmarks.environments import existing_python
from benchmarks.ingest import Feed
from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from benchmarks.trial import BenchWorker, Plan
from z4j_bare.buffer.report import read_report
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import POOLS

ENDS = ("killed", "stopped")
_CALIBRATION = 1500
_SETTLE = 2.0  # seconds from the last task to the kill; both agents commit within this time
_READY_SECONDS = 60.0
_STALLED = 60.0  # seconds without another row after which the rest counts as lost
_HEADER = (
    "worker",
    "agent",
    "tasks",
    "rows in the files",
    "first row s",
    "last row s",
    "5 s + backlog/rate",
    "lost",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison."""
    parser.add_argument(
        "--compare", action="store_true", help="compare outages of a worker with the existing agent"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=("ours", "existing"), default=["ours", "existing"]
    )
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS))
    parser.add_argument("--pool", choices=POOLS, default="gevent")
    parser.add_argument(
        "--tasks", type=int, default=500, help="tasks of each worker (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--row-timeout",
        type=float,
        default=240.0,
        help="seconds to wait for rows (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Measure the ingest rate, then the outages of each agent.

    Print and save the completed outages.
    """
    before = circumstances()
    found: list[OutageResult] = []
    failures: list[str] = []
    with Peers() as peers:
        rate = Feed(peers.new_agent("ingest")).rate(_CALIBRATION, 500)
        for _ in range(args.rounds):
            for end in args.ends:
                for name in args.variants:
                    _outage(peers, args, name, end, found, failures)
    lines = [
        line
        for end in args.ends
        for name in args.variants
        for line in _lines(end, name, found, rate)
    ]
    print(
        f"the brain ingests {rate:.0f} events/s; seconds after the next worker is ready; "
        f"medians of {args.rounds}"
    )
    print(table(_HEADER, lines))
    for failure in failures:
        print(f"failed: {failure}")
    content = {
        **before,
        "ingest_rate": rate,
        "outages": [asdict(each) for each in found],
        "failures": failures,
    }
    print(f"saved {save('outage', content)}")


def _outage(
    peers: Peers,
    args: argparse.Namespace,
    name: str,
    end: str,
    found: list[OutageResult],
    failures: list[str],
) -> None:
    plan = Plan(tasks=args.tasks, row_timeout=args.row_timeout, probes=0)
    python = existing_python() if name == "existing" else sys.executable
    progress(f"{name}, {end}")
    try:
        found.append(Outage(peers, plan, name, args.pool, python).after(end))
    except HarnessError as error:
        tail = (
            error.log.read_text(errors="replace")[-600:] if error.log and error.log.exists() else ""
        )
        failures.append(f"{name}, {end}: {error}\n{tail}")
        progress(f"  failed: {failures[-1]}")
        if not peers.brain.running:
            peers.brain.start()


@dataclass
class OutageResult:
    """What became of the ``tasks`` that the brain did not have when it was stopped.

    ``backlog`` counts rows of the buffer. ``boot`` is the time that the next worker took to start.
    ``first`` and ``last`` are the arrivals of the first and last row after that worker was ready
    (``inf``: never). All times are in seconds.
    """

    end: str
    variant: str
    tasks: int
    backlog: int
    boot: float
    first: float
    last: float
    lost: int


class Outage(BenchWorker):
    """Runs two workers on one home.

    The first worker ends while the brain is away, and the second worker adopts its buffer.
    """

    def after(self, end: str) -> OutageResult:
        """Kill or stop the first worker (``end``), start the second, and return what arrived."""
        self._peers.purge()
        with self._worker() as first:
            first.spawn((self._home / "ready").exists, _READY_SECONDS)
            self._meter = Meter(first.pid)
            self._warm_up()
            known, done = self._rows(), len(self._ends())
            self._peers.brain.stop()
            self._release(self._plan.tasks)
            until(
                lambda: len(self._ends()) >= done + self._plan.tasks,
                "the tasks",
                timeout=self._plan.row_timeout,
            )
            time.sleep(_SETTLE)
            if end == "killed":
                os.kill(first.pid, signal.SIGKILL)
            first.stop()
        ended = len(self._ends())
        backlog = self._backlog()
        self._peers.brain.start()
        (self._home / "ready").unlink()
        began = time.monotonic()
        with self._worker() as second:
            second.spawn((self._home / "ready").exists, _READY_SECONDS)
            ready = time.monotonic()
            first_row, last_row, rows = self._arrivals(ready, known, ended)
        return OutageResult(
            end,
            self._variant,
            ended - known,
            backlog,
            ready - began,
            first_row,
            last_row,
            ended - rows,
        )

    def _backlog(self) -> int:
        """Count the rows in the buffer files."""
        paths = [*(self._home / "agent").glob("**/*.sqlite")]
        if self._variant == "ours":
            return sum(read_report(path).total for path in paths)
        rows = 0
        for path in paths:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                if connection.execute(
                    "SELECT 1 FROM sqlite_master WHERE name = 'entries'"
                ).fetchone():
                    rows += connection.execute("SELECT count(*) FROM entries").fetchone()[0]
        return rows

    def _arrivals(self, since: float, known: int, expected: int) -> tuple[float, float, int]:
        """Poll the rows.

        Return the arrival of the first and last new row, and the number of rows.
        """
        first = last = float("inf")
        while (now := time.monotonic() - since) < self._plan.row_timeout and known < expected:
            found = self._rows()
            if found > known:
                known, first, last = found, min(first, now), now
            elif last < now - _STALLED:
                break
            time.sleep(0.1)
        return first, last, known


def _lines(
    end: str, name: str, outcomes: list[OutageResult], rate: float
) -> Iterator[tuple[object, ...]]:
    """Yield the table line of one agent and one end, if it has results."""
    mine = [each for each in outcomes if (each.end, each.variant) == (end, name)]
    if not mine:
        return
    backlog = median(each.backlog for each in mine)
    yield (
        end,
        name,
        f"{median(each.tasks for each in mine):.0f}",
        f"{backlog:.0f}",
        f"{median(each.first for each in mine):.1f}",
        f"{median(each.last for each in mine):.1f}",
        f"{5 + backlog / rate:.1f}",
        ", ".join(str(each.lost) for each in mine),
    )
