"""Time until the brain has every row of a burst of tasks, and its ingest rate."""

from __future__ import annotations

import argparse
import sys
from statistics import median

from benchmarks.environments import existing_python
from benchmarks.ingest import Feed
from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from benchmarks.trial import BenchWorker, Plan, Trial
from z4j_bare.demo.worker import POOLS

EVENTS = 3  # of one task: received, started, succeeded
_CALIBRATION = 3000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument(
        "--tasks", type=int, default=4000, help="released at once (default: %(default)s)"
    )
    parser.add_argument("--pool", choices=POOLS, default="gevent")
    parser.add_argument(
        "--variants", nargs="+", choices=("ours", "existing"), default=["ours", "existing"]
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--row-timeout",
        type=float,
        default=300.0,
        help="seconds to wait for rows (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Measure the brain's ingest rate, then the burst of each agent; print and save the table."""
    before = circumstances()
    plan = Plan(tasks=args.tasks, row_timeout=args.row_timeout, probes=0)
    trials: dict[str, list[Trial]] = {name: [] for name in args.variants}
    rates: list[float] = []
    with Peers() as peers:
        for number in range(args.rounds):
            progress(f"round {number + 1}: the brain's ingest rate")
            rates.append(Feed(peers.new_agent("ingest")).rate(_CALIBRATION, 500))
            for name in args.variants:
                progress(f"round {number + 1}: {name}")
                python = existing_python() if name == "existing" else sys.executable
                peers.purge()
                trials[name].append(BenchWorker(peers, plan, name, args.pool, python).run())
    rows = [_line(name, found) for name, found in trials.items()]
    print(f"the brain ingests {median(rates):.0f} events/s of one connection in frames of 500")
    print(
        table(("agent", "tasks", "rows in the brain", "seconds to the last row", "events/s"), rows)
    )
    content = {name: [trial.to_object() for trial in found] for name, found in trials.items()}
    print(f"saved {save('burst', {**before, 'ingest_rates': rates, 'trials': content})}")


def _line(name: str, trials: list[Trial]) -> tuple[object, ...]:
    rows = ", ".join(str(trial.rows) for trial in trials)
    seconds = median(trial.end_seconds for trial in trials)
    rate = median(EVENTS * (trial.rows or 0) / trial.end_seconds for trial in trials)
    return name, trials[0].tasks, rows, f"{seconds:.1f}", f"{rate:.0f}"
