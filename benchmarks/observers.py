"""Cost of the agent in a Celery worker, compared with other monitoring libraries in one run.

The workers of a round run at the same time on one processor and get the same batches of tasks at
the same moments, as in ``host``. Each library has its usual set-up, and a sink on the loopback
interface that answers and counts. A round fails if a task has not arrived at the other end.
``benchmarks/README.md`` describes the method.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cpu import reserve_processor
from benchmarks.environments import OBSERVERS, installed_versions, observers_python
from benchmarks.figures import Comparison, compare
from benchmarks.observer import Agent, Library, Observer, ScrapedAgent
from benchmarks.peers import ARGUMENTS, Peers, progress, rotated
from benchmarks.report import circumstances, picture, save, table
from benchmarks.trial import BenchWorker, Plan, Trial, open_together, run_in_step
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.worker import POOLS

#: What observes the workers of a round, in the order of the table.
VARIANTS = (
    "off",
    "ours",
    "scraped",
    "opentelemetry",
    "ddtrace",
    "sentry-errors",
    "sentry-traces",
    "events",
)

#: Seconds without tasks at the end of a round, before the memory is measured.
_IDLE_SECONDS = 5.0

#: Maximum seconds until a batch has arrived at the other ends. The brain is the slowest.
_ARRIVAL_TIMEOUT = 240.0

#: Number of tasks that raise an exception before the first batch.
_FAILURES = 10

_HEADER = (
    "pool",
    "observer",
    "CPU ms/task",
    "to no agent [95 %]",
    "to this agent [95 %]",
    "RSS MB",
    "added RSS [95 %]",
    "PSS MB",
    "added PSS [95 %]",
    "arrived",
)

#: The measured values of the picture, and their titles.
_PANELS = (
    ("cpu_ms", "worker CPU per task (ms)"),
    ("rss_mb", "RSS (MB)"),
    ("pss_mb", "PSS (MB)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=["gevent", "prefork"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--batches", type=int, default=5, help="for each worker of a round (default: %(default)s)"
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
        "--no-pin", action="store_true", help="do not reserve a processor for the workers"
    )


def run(args: argparse.Namespace) -> None:
    """Run all rounds; print the table and save JSON and picture of the completed rounds.

    Raises ``HarnessError`` if a round has failed.
    """
    before = circumstances()
    python = observers_python()
    names = [requirement.partition(">")[0] for requirement in OBSERVERS]
    before["versions"] |= installed_versions(python, names)
    plan = Plan(
        tasks=args.tasks,
        arguments=args.arguments,
        concurrency=args.concurrency,
        children=args.children,
        core=None if args.no_pin else reserve_processor(),
        probes=0,
        row_timeout=_ARRIVAL_TIMEOUT,
        failures=_FAILURES,
    )
    rounds: dict[str, list[dict[str, Trial]]] = {pool: [] for pool in args.pools}
    failures: list[str] = []
    try:
        with Peers() as peers:
            for number in range(args.rounds):
                for pool in args.pools:
                    names = rotated(args.variants, number)
                    try:
                        rounds[pool].append(
                            _round(peers, plan, pool, number, names, python, args.batches)
                        )
                    except HarnessError as error:
                        failures.append(f"round {number + 1}, {pool}: {error}")
                        progress(f"  failed: {error}")
    finally:
        _publish(args, before, rounds, failures)
    if failures:
        raise HarnessError(f"{len(failures)} rounds have failed")


def _round(
    peers: Peers,
    plan: Plan,
    pool: str,
    number: int,
    names: Sequence[str],
    python: str,
    batches: int,
) -> dict[str, Trial]:
    """Start one worker of each variant and give all of them the same batches."""
    peers.purge()
    workers = [
        BenchWorker(
            peers,
            plan,
            name,
            pool,
            python,
            database,
            _observer(name, peers, f"{pool}-{name}", python, peers.broker(database)),
        )
        for database, name in enumerate(names)
    ]
    with ExitStack() as stack:
        open_together(stack, workers)
        for batch in range(batches):
            progress(f"round {number + 1}: {pool}, batch {batch + 1}")
            run_in_step(peers, plan, workers)
        time.sleep(_IDLE_SECONDS)
        for worker in workers:
            worker.measure_idle()
        for worker in workers:
            worker.check_delivery()
    return {worker.trial.variant: worker.trial for worker in workers}


def _observer(name: str, peers: Peers, title: str, python: str, broker: str) -> Observer:
    if name == "off":
        return Observer()
    if name == "ours":
        return Agent(peers, title)
    if name == "scraped":
        return ScrapedAgent(peers, title, python)
    if name == "events":
        return Library(python, "events", options=["--task-events"], broker=broker)
    if name == "ddtrace":
        launcher = str(Path(python).with_name("ddtrace-run"))
        return Library(python, "ddtrace", launcher=[launcher])
    if name == "opentelemetry":
        return Library(python, name, set_up=name)
    set_up = name.replace("-", "_")
    return Library(python, "sentry", set_up=set_up, sends_successes=name == "sentry-traces")


def _publish(
    args: argparse.Namespace,
    before: dict[str, Any],
    rounds: Mapping[str, Sequence[dict[str, Trial]]],
    failures: Sequence[str],
) -> None:
    for failure in failures:
        print(f"failed: {failure}")
    pools = {pool: compare(done, args.variants) for pool, done in rounds.items() if done}
    if not pools:
        return
    lines = [
        _line(pool, name, each) for pool, found in pools.items() for name, each in found.items()
    ]
    print(table(_HEADER, lines))
    content = {
        **before,
        "options": {key: value for key, value in vars(args).items() if key != "name"},
        "summary": pools,
        "failures": failures,
        "trials": {
            pool: [{name: trial.to_object() for name, trial in each.items()} for each in done]
            for pool, done in rounds.items()
        },
    }
    path = save(f"observers-{args.arguments}", content)
    title = f"{args.rounds} rounds of {args.batches} x {args.tasks} tasks of 10 ms"
    drawn = {
        pool: {name: each.to_object() for name, each in found.items()}
        for pool, found in pools.items()
    }
    for suffix in (".png", ".svg"):
        picture(path.with_suffix(suffix), title, drawn, _PANELS)
    print(f"saved {path}")


def _line(pool: str, name: str, each: Comparison) -> list[str]:
    arrived = "-" if each.arrived is None else f"{each.arrived} of {each.tasks}"
    return [
        pool,
        name,
        f"{each.cpu_ms:.3f}",
        str(each.to_base or "-"),
        str(each.to_ours or "-"),
        f"{each.rss_mb:.1f}",
        str(each.added_rss_mb or "-"),
        f"{each.pss_mb:.1f}",
        str(each.added_pss_mb or "-"),
        arrived,
    ]
