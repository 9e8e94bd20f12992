"""Cost of the agent in a Celery worker, compared with no agent and with other agents in one run.

The workers of a round run at the same time, share one processor, and get the same batches of tasks
at the same moments: a machine that is slow for a second is slow for all. CPU is counted from the
release of a batch until the brain has its last row, so that postponed work is counted; what the
worker without an agent uses meanwhile is subtracted. ``benchmarks/README.md`` describes the method.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cpu import reserve_processor
from benchmarks.environments import existing_python
from benchmarks.figures import VARIANTS, batch_cpu_ratio, compare, quantile, summary
from benchmarks.peers import ARGUMENTS, Peers, progress, rotated
from benchmarks.report import circumstances, picture, save, table
from benchmarks.trial import BenchWorker, Plan, Trial, open_together, run_in_step
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.worker import POOLS

_IDLE_SECONDS = 5.0  # without tasks at the end of a round, to measure idle CPU

_HEADER = (
    "pool",
    "agent",
    "CPU ms/task",
    "ratio [95 %]",
    "tasks/s",
    "lag p50/p99/max ms",
    "RSS MB",
    "PSS MB",
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
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["off", "ours", "existing"]
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--batches", type=int, default=8, help="for each worker of a round (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks", type=int, default=250, help="tasks of 10 ms per batch (default: %(default)s)"
    )
    parser.add_argument("--arguments", choices=ARGUMENTS, default="none")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=100,
        help="tasks at a time in all pools but prefork (default: %(default)s)",
    )
    parser.add_argument(
        "--children", type=int, default=2, help="children of prefork (default: %(default)s)"
    )
    parser.add_argument(
        "--row-timeout",
        type=float,
        default=180.0,
        help="seconds to wait for rows (default: %(default)s)",
    )
    parser.add_argument(
        "--loglevel",
        default="WARNING",
        help="log level of the worker (default: %(default)s)",
    )
    parser.add_argument(
        "--attribute",
        action="store_true",
        help="assign CPU time to parts of the agent, which itself costs CPU",
    )
    parser.add_argument(
        "--no-pin", action="store_true", help="do not reserve a processor for the workers"
    )
    parser.add_argument(
        "--baseline",
        default="",
        metavar="DIRECTORY",
        help="another checkout of this project, measured as variant 'baseline'",
    )


def run(args: argparse.Namespace) -> None:
    """Run all rounds; print the table and save JSON and picture of the completed rounds."""
    before = circumstances()
    if args.baseline and "baseline" not in args.variants:
        args.variants.append("baseline")
    if "baseline" in args.variants and not Path(args.baseline, "z4j_bare").is_dir():
        raise HarnessError(
            "--variants baseline needs --baseline DIRECTORY, a checkout of this project"
        )
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
                    names = rotated(args.variants, number)
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
    return Plan(
        tasks=args.tasks,
        arguments=args.arguments,
        concurrency=args.concurrency,
        children=args.children,
        row_timeout=args.row_timeout,
        loglevel=args.loglevel,
        attribute=args.attribute,
        core=None if args.no_pin else reserve_processor(),
        baseline=str(Path(args.baseline).resolve()) if args.baseline else "",
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
    """Start one worker of each variant and give all of them the same batches."""
    peers.purge()
    workers = [
        BenchWorker(peers, plan, name, pool, pythons[name], database)
        for database, name in enumerate(names)
    ]
    with ExitStack() as stack:
        open_together(stack, workers)
        for batch in range(batches):
            progress(f"round {number + 1}: {pool}, batch {batch + 1}")
            run_in_step(peers, plan, workers)
        time.sleep(_IDLE_SECONDS)
        for step in (BenchWorker.measure_idle, BenchWorker.start_ticker, BenchWorker.measure_lag):
            for worker in rotated(workers, number):
                step(worker)
    return {worker.trial.variant: worker.trial for worker in workers}


def _publish(
    args: argparse.Namespace,
    before: dict[str, Any],
    rounds: dict[str, list[dict[str, Trial]]],
    failures: list[str],
) -> None:
    pools = {pool: found for pool, done in rounds.items() if (found := summary(done))}
    compared = {
        pool: ratio
        for pool, done in rounds.items()
        if (ratio := batch_cpu_ratio(done, "ours", "baseline"))
    }
    if not (pools or compared):
        return
    lines = [
        _line(pool, name, each) for pool, found in pools.items() for name, each in found.items()
    ]
    if lines:
        print(table(_HEADER, lines))
    for pool, ratio in compared.items():
        print(f"{pool}: CPU of ours / baseline {ratio}, {ratio.rounds} batches")
        added = compare(rounds[pool], ("baseline", "ours"), base="baseline")["ours"]
        print(f"{pool}: MB of ours - baseline: RSS {added.added_rss_mb}, PSS {added.added_pss_mb}")
    for failure in failures:
        print(f"failed: {failure}")
    content = {
        **before,
        "options": {key: value for key, value in vars(args).items() if key != "name"},
        "summary": pools,
        "ours_to_baseline": compared,
        "failures": failures,
        "trials": {pool: [_compact(each) for each in done] for pool, done in rounds.items()},
    }
    path = save(f"host-{args.arguments}", content)
    tasks = f"{args.rounds} rounds of {args.batches} x {args.tasks} tasks of 10 ms"
    title = f"{tasks}, arguments: {args.arguments}"
    for suffix in (".png", ".svg") if pools else ():
        picture(path.with_suffix(suffix), title, pools)
    print(f"saved {path}")


def _line(pool: str, name: str, each: dict[str, Any]) -> list[str]:
    delay = each["row_delay_ms"]
    lag = "/".join(f"{each[key]:.1f}" for key in ("lag_p50_ms", "lag_p99_ms", "lag_max_ms"))
    return [
        pool,
        name,
        f"{each['cpu_ms']:.3f}",
        "1" if name == "off" else str(each["cpu_ratio"]),
        f"{each['tasks_per_second']:.0f}",
        lag,
        f"{each['rss_mb']:.1f}",
        f"{each['pss_mb']:.1f}",
        f"{each['idle_ms_per_s']:.1f}",
        "-" if delay is None else f"{delay[0]:.0f} (max {delay[1]:.0f})",
        "-" if name == "off" else f"{each['last_row_s']:.1f}",
        "-" if name == "off" else ", ".join(map(str, sorted(set(each["rows"])))),
    ]


def _compact(trials: dict[str, Trial]) -> dict[str, Any]:
    """Return a round as JSON types, the lags as quantiles."""
    content = {name: trial.to_object() for name, trial in trials.items()}
    for name, trial in trials.items():
        shares = (0.5, 0.9, 0.99, 0.999, 1.0) if trial.hub_lags else ()
        content[name]["hub_lags"] = {
            str(share): quantile(trial.hub_lags, share) for share in shares
        }
    return content
