"""What the agent costs a Celery worker: no agent, ours and the existing one in turn, on the same brain and broker.

The workers of a round live together, share one processor, and get small batches of the same tasks at the same moments: a
machine that is slow for a second is slow for all. CPU is counted from the release of a batch until the brain has its last
row, so that work put off is counted too; what the agentless worker uses at the same time, idling, is taken off.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from typing import Any, TypeVar

from benchmarks.existing import existing_python
from benchmarks.figures import quantile, summary
from benchmarks.peers import ARGUMENTS, Peers, progress
from benchmarks.report import circumstances, picture, save, table
from benchmarks.trial import VARIANTS, Plan, Stage, Trial, in_step
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.worker import POOLS

T = TypeVar("T")

_IDLE_SECONDS = 5.0  # of a round, in which all workers rest, to see what that costs

_HEADER = (
    "pool",
    "agent",
    "CPU ms/task",
    "ratio [95 %]",
    "tasks/s",
    "late p50/p99/max ms",
    "RSS MB",
    "idle ms/s",
    "row delay ms",
    "last row s",
    "rows",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument(
        "--pools", nargs="+", choices=POOLS, default=["gevent", "eventlet", "threads", "prefork"]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--batches", type=int, default=8, help="for each worker of a round (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks", type=int, default=250, help="tasks of 10 ms per batch (default: %(default)s)"
    )
    parser.add_argument("--arguments", choices=ARGUMENTS, default="none")
    parser.add_argument(
        "--concurrency", type=int, default=100, help="prefork: 2 children (default: %(default)s)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=180.0,
        help="seconds to wait for rows (default: %(default)s)",
    )
    parser.add_argument(
        "--loglevel",
        default="WARNING",
        help="of the worker; Celery's default (default: %(default)s)",
    )
    parser.add_argument(
        "--attribute",
        action="store_true",
        help="measure where the CPU goes, which costs some itself",
    )
    parser.add_argument("--no-pin", action="store_true", help="leave all processors to everybody")


def run(args: argparse.Namespace) -> None:
    """Run all rounds; print the table, and save JSON and picture, of whatever has come through."""
    before = circumstances()
    pythons = dict.fromkeys(VARIANTS, sys.executable)
    if "existing" in args.variants:
        pythons["existing"] = existing_python()
    plan = _plan(args)
    rounds: dict[str, list[dict[str, Trial]]] = {pool: [] for pool in args.pools}
    failures: list[str] = []
    try:
        with Peers() as peers:
            for number in range(args.rounds):
                for pool in args.pools:
                    names = _turned(args.variants, number)
                    try:
                        rounds[pool].append(
                            _round(peers, plan, pool, number, names, pythons, args.batches)
                        )
                    except HarnessError as error:
                        failures.append(f"round {number + 1}, {pool}: {error}")
                        progress(f"  failed: {error}")
    finally:
        _publish(args, before, rounds, failures)


def _plan(args: argparse.Namespace) -> Plan:
    cores = sorted(os.sched_getaffinity(0))
    core = None
    if not args.no_pin and len(cores) > 1:
        core = cores[-1]
        os.sched_setaffinity(
            0, cores[:-1]
        )  # brain, broker and harness inherit it; the worker leaves it for its own
    return Plan(
        tasks=args.tasks,
        arguments=args.arguments,
        concurrency=args.concurrency,
        patience=args.patience,
        loglevel=args.loglevel,
        attribute=args.attribute,
        core=core,
    )


def _round(
    peers: Peers,
    plan: Plan,
    pool: str,
    number: int,
    names: list[str],
    pythons: dict[str, str],
    batches: int,
) -> dict[str, Trial]:
    """Start one worker of each variant, and give them batches in step."""
    peers.purge()
    stages = [
        Stage(peers, plan, name, pool, pythons[name], database)
        for database, name in enumerate(names)
    ]
    with ExitStack() as living:
        for stage in stages:
            living.enter_context(stage.open())
        for batch in range(batches):
            progress(f"round {number + 1}: {pool}, batch {batch + 1}")
            in_step(peers, plan, stages)
        time.sleep(_IDLE_SECONDS)
        for step in (Stage.rest, Stage.tick, Stage.late):
            for stage in _turned(stages, number):
                step(stage)
    return {stage.trial.variant: stage.trial for stage in stages}


def _turned(items: list[T], number: int) -> list[T]:
    turn = number % len(items)
    return items[turn:] + items[:turn]


def _publish(
    args: argparse.Namespace,
    before: dict[str, Any],
    rounds: dict[str, list[dict[str, Trial]]],
    failures: list[str],
) -> None:
    pools = {pool: found for pool, done in rounds.items() if (found := summary(done))}
    if not pools:
        return
    print(
        table(
            _HEADER,
            [
                _line(pool, name, each)
                for pool, found in pools.items()
                for name, each in found.items()
            ],
        )
    )
    for failure in failures:
        print(f"failed: {failure}")
    content = {
        **before,
        "options": {key: value for key, value in vars(args).items() if key != "name"},
        "summary": pools,
        "failures": failures,
        "trials": {pool: [_compact(each) for each in done] for pool, done in rounds.items()},
    }
    path = save(f"host-{args.arguments}", content)
    title = f"{args.batches} x {args.tasks} tasks of 10 ms, arguments: {args.arguments}, {args.rounds} rounds"
    picture(path.with_suffix(".png"), title, pools)
    print(f"saved {path} and {path.with_suffix('.png').name}")


def _line(pool: str, name: str, each: dict[str, Any]) -> list[str]:
    delay = each["row_delay_ms"]
    late = "/".join(f"{each[key]:.1f}" for key in ("late_p50_ms", "late_p99_ms", "late_max_ms"))
    return [
        pool,
        name,
        f"{each['cpu_ms']:.3f}",
        "1" if name == "off" else str(each["cpu_ratio"]),
        f"{each['tasks_per_second']:.0f}",
        late,
        f"{each['rss_mb']:.1f}",
        f"{each['idle_ms_per_s']:.1f}",
        "-" if delay is None else f"{delay[0]:.0f} (max {delay[1]:.0f})",
        "-" if name == "off" else f"{each['last_row_s']:.1f}",
        "-" if name == "off" else ", ".join(map(str, sorted(set(each["rows"])))),
    ]


def _compact(trials: dict[str, Trial]) -> dict[str, Any]:
    """Return a round as JSON types, with the ticker's samples as quantiles."""
    content = {name: trial.to_object() for name, trial in trials.items()}
    for name, trial in trials.items():
        shares = (0.5, 0.9, 0.99, 0.999, 1.0) if trial.lateness else ()
        content[name]["lateness"] = {
            str(share): quantile(trial.lateness, share) for share in shares
        }
    return content
