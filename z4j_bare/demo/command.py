"""The command ``z4j-bare demo``: start the peers, run the scenario, compare, stop the peers."""

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
from z4j_bare.demo.brain import Brain, brain_command, new_secrets
from z4j_bare.demo.database import DemoDatabase
from z4j_bare.demo.display import LineProgress, make_progress, render
from z4j_bare.demo.poller import BrainPoller
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.redis_server import RedisServer, find_program
from z4j_bare.demo.report import Report, build_report
from z4j_bare.demo.scenario import Peers, Scenario, expected_total
from z4j_bare.demo.task_log import TaskLog
from z4j_bare.demo.worker import POOLS, Worker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from celery import Celery

_PROJECT = "demo"
_WORKER = "worker@demo"
_APP = "z4j_bare.demo.app"

#: Value of ``--broker`` for message files in the run's private directory.
FILES = "files"

#: Default number of plain tasks.
_TASKS = 50


class InterruptedBySignal(KeyboardInterrupt):
    """The process received the signal ``number``. The exception ends the demo."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``z4j-bare demo`` to its parser."""
    parser.add_argument(
        "--pool", choices=POOLS, default="gevent", help="the worker's pool (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks",
        type=_count,
        default=_TASKS,
        metavar="N",
        help="number of plain tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the brain running until Ctrl-C, and keep its directory",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--broker",
        metavar="URL",
        help="use this broker, such as redis://host/0 or amqp://user:password@host/vhost, or "
        f"{FILES!r} (default: a private Redis server, or files if no such server is installed)",
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        help="let the brain use this empty PostgreSQL database, "
        "postgresql://user:password@host/name (default: a private SQLite file)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo and return its exit code.

    The exit code is 0 if all figures agree. It is 1 if a figure does not agree or the demo cannot
    run, and 128 + n after the signal n.
    """
    try:
        _check_extras(args.pool)
        with _signals_interrupt(), _private_directory(keep=args.keep) as home:
            return _run_in(home, args)
    except HarnessError as exc:
        print(f"z4j-bare demo: {exc}", file=sys.stderr)
        return 1
    except InterruptedBySignal as exc:
        print("z4j-bare demo: interrupted; brain and worker are stopped", file=sys.stderr)
        return 128 + exc.number


def _run_in(home: Path, args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        with make_progress(expected_total(args.tasks)) as progress:
            url = stack.enter_context(_broker_url(home, args.broker))
            producer = stack.enter_context(broker.producer(home, url))
            brain = stack.enter_context(_brain(home / "brain", args))
            progress.stage("starting the brain")
            brain.start()
            report = _run_scenario(home, brain, producer, url, args, progress)
        if args.keep:
            report.dashboard = {"url": brain.url, "email": brain.email, "password": brain.password}
            report.directory = str(home)
        print(json.dumps(report.to_object()) if args.json else render(report), flush=True)
        if args.keep:
            _keep_brain_running(brain, home)
    if not report.ok:
        raise HarnessError("the figures do not agree", log=home / "worker.log")
    return 0


@contextmanager
def _broker_url(home: Path, option: str | None) -> Iterator[str | None]:
    """Yield the broker's URL, or ``None`` for files. Without a choice, run a private server."""
    if option:
        yield None if option == FILES else option
    elif find_program() is None or importlib.util.find_spec("redis") is None:
        yield None
    else:
        with RedisServer(home / "redis") as server:
            yield server.url()


@contextmanager
def _brain(home: Path, args: argparse.Namespace) -> Iterator[Brain]:
    """Yield a brain that is not started yet, on the selected database; then stop it."""
    with ExitStack() as stack:
        if args.database:
            database = stack.enter_context(DemoDatabase(args.database, keep=args.keep))
            brain = Brain(home, database_url=database.brain_url, environment=new_secrets())
        else:
            brain = Brain(home)
        stack.push(brain.__exit__)
        yield brain


def _run_scenario(
    home: Path,
    brain: Brain,
    producer: Celery,
    broker_url: str | None,
    args: argparse.Namespace,
    progress: LineProgress,
) -> Report:
    """Start the worker, run the scenario, stop the worker, and build the report."""
    began = time.monotonic()
    brain.create_project(_PROJECT)
    agent = brain.mint_agent(_PROJECT, f"demo-{args.pool}")
    environment = {**agent.env(home / "agent"), **broker.environment(home, broker_url)}
    with (
        Worker(
            _APP, pool=args.pool, log=home / "worker.log", environment=environment, name=_WORKER
        ) as worker,
        BrainPoller(brain.clone(), _PROJECT) as poller,
    ):
        progress.stage(f"starting the {args.pool} worker")
        worker.start()
        peers = Peers(brain, agent, worker, poller, TaskLog(home), producer, home)
        record = Scenario(peers, args.tasks, progress).run()
        at_work = brain.agent(_PROJECT, agent.agent_id)
        progress.stage("stopping the worker")
        worker.stop()
    report = build_report(peers, record, at_work, broker.address(broker_url))
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _keep_brain_running(brain: Brain, home: Path) -> None:
    """Keep the brain running until Ctrl-C or SIGTERM."""
    print(
        f"z4j-bare demo: the brain runs until Ctrl-C; its data and all logs are in {home}",
        file=sys.stderr,
        flush=True,
    )
    try:
        brain.wait()
    except InterruptedBySignal:
        brain.stop()


@contextmanager
def _private_directory(*, keep: bool) -> Iterator[Path]:
    """Yield a new directory with mode 0700 and delete it afterwards.

    The directory is not deleted if ``keep`` is true or a ``HarnessError`` names a log file.
    """
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
    """Raise ``InterruptedBySignal`` on the first SIGINT or SIGTERM and ignore later ones.

    A second signal must not interrupt the shutdown of the peers.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise InterruptedBySignal(number)

    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_extras(pool: str) -> None:
    """Raise ``HarnessError`` if a package is missing. The message names the packages to install."""
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
