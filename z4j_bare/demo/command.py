"""``z4j-bare demo``: start everything, let the day pass, compare, stop everything."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from z4j_bare.demo import broker
from z4j_bare.demo.brain import Brain, brain_command
from z4j_bare.demo.poller import BrainPoller
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.progress import Lines, display
from z4j_bare.demo.report import Report, build_report
from z4j_bare.demo.scenario import Peers, Scenario, expected_total
from z4j_bare.demo.table import render
from z4j_bare.demo.task_log import TaskLog
from z4j_bare.demo.worker import POOLS, Worker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from celery import Celery

_PROJECT = "demo"
_WORKER = "day@demo"
_APP = "z4j_bare.demo.app"
_TASKS = 50


class InterruptedBySignal(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; ``number`` is which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``z4j-bare demo`` understands to its parser."""
    parser.add_argument(
        "--pool", choices=POOLS, default="gevent", help="the worker's pool (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks",
        type=_count,
        default=_TASKS,
        metavar="N",
        help="plain tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the brain up until Ctrl-C, and its directory"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    parser.add_argument(
        "--broker", metavar="URL", help="a real broker instead of files in a private directory"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo: 0 when every figure agrees, 1 when not or when it cannot run, 128 + n after signal n."""
    try:
        _check_extras(args.pool)
        with _signals_interrupt(), _private_directory(keep=args.keep) as home:
            return _run_in(home, args)
    except HarnessError as exc:
        print(f"z4j-bare demo: {exc}", file=sys.stderr)
        return 1
    except InterruptedBySignal as exc:
        print("z4j-bare demo: interrupted, everything is stopped", file=sys.stderr)
        return 128 + exc.number


def _run_in(home: Path, args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        with display(expected_total(args.tasks)) as progress:
            producer = stack.enter_context(broker.producer(home, args.broker))
            progress.stage("starting the brain")
            brain = stack.enter_context(Brain(home / "brain"))
            report = _run_scenario(home, brain, producer, args, progress)
        if args.keep:
            report.dashboard = {"url": brain.url, "email": brain.email, "password": brain.password}
            report.directory = str(home)
        print(json.dumps(report.to_object()) if args.json else render(report), flush=True)
        if args.keep:
            _keep_brain_running(brain, home)
    if not report.ok:
        raise HarnessError("the figures do not agree", log=home / "worker.log")
    return 0


def _run_scenario(
    home: Path, brain: Brain, producer: Celery, args: argparse.Namespace, progress: Lines
) -> Report:
    """Start the worker, let the day pass, stop the worker, compare."""
    began = time.monotonic()
    brain.create_project(_PROJECT)
    agent = brain.mint_agent(_PROJECT, f"demo-{args.pool}")
    environment = {**agent.env(home / "agent"), **broker.environment(home, args.broker)}
    with (
        Worker(
            _APP, pool=args.pool, log=home / "worker.log", environment=environment, name=_WORKER
        ) as worker,
        BrainPoller(brain.sibling(), _PROJECT) as poller,
    ):
        progress.stage(f"starting the {args.pool} worker")
        worker.start()
        peers = Peers(brain, agent, worker, poller, TaskLog(home), producer, home)
        record = Scenario(peers, args.tasks, progress).run()
        at_work = brain.agent(_PROJECT, agent.agent_id)
        progress.stage("stopping the worker")
        worker.stop()
    report = build_report(peers, record, at_work, broker.address(args.broker))
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _keep_brain_running(brain: Brain, home: Path) -> None:
    """Leave the brain up until Ctrl-C or SIGTERM."""
    print(
        f"z4j-bare demo: the brain stays up until Ctrl-C; everything is in {home}",
        file=sys.stderr,
        flush=True,
    )
    try:
        brain.wait()
    except InterruptedBySignal:
        brain.stop()


@contextmanager
def _private_directory(*, keep: bool) -> Iterator[Path]:
    """Yield a new directory of mode 0700; it stays with ``keep``, and where an error names a log in it."""
    home = Path(tempfile.mkdtemp(prefix="z4j-demo-"))
    try:
        yield home
    except HarnessError as exc:
        keep = keep or exc.log is not None
        raise
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into ``InterruptedBySignal``; later ones must not disturb."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise InterruptedBySignal(number)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_extras(pool: str) -> None:
    """Raise ``HarnessError`` naming what has to be installed."""
    missing = [name for name in ("celery", "z4j_celery") if importlib.util.find_spec(name) is None]
    if brain_command() is None:
        missing.append("z4j (the brain)")
    if missing:
        raise HarnessError(f"{', '.join(missing)} not installed: pip install 'z4j-bare[demo]'")
    if pool in {"gevent", "eventlet"} and importlib.util.find_spec(pool) is None:
        raise HarnessError(f"{pool} is not installed: pip install 'z4j-bare[demo,{pool}]'")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
