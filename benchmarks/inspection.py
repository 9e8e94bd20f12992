"""Time of ``z4j-bare tasks`` and ``hub``, and their cost in the worker that they ask.

A real worker runs 100 or 1,000 tasks that wait eleven calls deep. The benchmark asks it for their
stacks, by the command and by the socket alone, and measures the steps of the hub meanwhile. Then
two workers with the same tasks run in step, one of them with ``hub --profile``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.cpu import reserve_processor
from benchmarks.figures import Difference, paired_difference, quantile
from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from benchmarks.trial import BenchWorker, Plan
from z4j_bare.control import HUB, TASKS, ControlClient
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import worker_environment

POOLS = ("gevent", "eventlet", "threads")

#: Seconds until all tasks run, and until the recorder has written its result.
_TIMEOUT = 60.0

#: Maximum seconds until the brain has the rows of the tasks that warm the worker up.
_ROW_TIMEOUT = 20.0

#: Seconds without requests, in which the lag is measured for comparison.
_QUIET_SECONDS = 5.0

#: Number of tasks that wait in a worker that is profiled.
_PROFILED_TASKS = 100

#: Seconds between two groups of tasks while a profile runs.
_GROUP_INTERVAL = 0.5

_ASK_HEADER = (
    "pool",
    "running tasks",
    "command s, p50/max",
    "answer ms, p50/max",
    "answer KB",
    "longest step ms",
    "lag max ms, asked/not",
)
_PROFILE_HEADER = ("pool", "CPU ms/s without", "with", "difference [95 %]", "percent of a core")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS))
    parser.add_argument("--running", nargs="*", type=int, default=[100, 1000])
    parser.add_argument(
        "--requests", type=int, default=20, help="to the socket (default: %(default)s)"
    )
    parser.add_argument(
        "--commands", type=int, default=5, help="z4j-bare tasks (default: %(default)s)"
    )
    parser.add_argument(
        "--profile",
        type=float,
        default=30.0,
        help="seconds of one profile (default: %(default)s)",
    )
    parser.add_argument(
        "--windows", type=int, default=4, help="profiles of each pool (default: %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=40.0,
        help="tasks a second in each worker during the profiles (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Measure each pool; print the tables and save JSON."""
    before = circumstances()
    core = reserve_processor()
    asked: list[Asked] = []
    profiled: list[Profiled] = []
    try:
        with Peers() as peers:
            for pool in args.pools:
                for running in args.running:
                    progress(f"{pool}: {running} running tasks")
                    asked.append(_ask(peers, pool, running, core, args))
                if args.windows:
                    profiled.append(_profile(peers, pool, core, args))
    finally:
        if asked:
            print(table(_ASK_HEADER, [each.line() for each in asked]))
        if profiled:
            print(table(_PROFILE_HEADER, [each.line() for each in profiled]))
        if asked or profiled:
            options = {key: value for key, value in vars(args).items() if key != "name"}
            content = {**before, "options": options, "asked": asked, "profiled": profiled}
            print(f"saved {save('inspection', content)}")


@dataclass
class Asked:
    """The seconds of requests to one worker, and the state of its hub meanwhile.

    ``longest`` is the CPU time of the hub's longest step, ``None`` without a hub; ``place`` is the
    code in which that step ended. ``lag`` is the longest lag of a timer of 5 ms during the
    requests, and ``quiet_lag`` before them.
    """

    pool: str
    running: int
    commands: list[float]
    answers: list[float]
    answer_bytes: int
    longest: float | None
    place: str
    longest_collection: float
    lag: float
    quiet_lag: float

    def line(self) -> tuple[object, ...]:
        """Return the cells of the table."""
        return (
            self.pool,
            self.running,
            f"{median(self.commands):.2f}/{max(self.commands):.2f}" if self.commands else "-",
            f"{median(self.answers) * 1e3:.0f}/{max(self.answers) * 1e3:.0f}",
            f"{self.answer_bytes / 1e3:.0f}",
            "-" if self.longest is None else f"{self.longest * 1e3:.1f} ({self.place})",
            f"{self.lag * 1e3:.1f}/{self.quiet_lag * 1e3:.1f}",
        )


@dataclass
class Profiled:
    """CPU seconds a second of a worker with a profile and of another without, by window."""

    pool: str
    without: list[float]
    profile: list[float]

    def difference(self) -> Difference:
        """Return the CPU milliseconds a second that the profile takes."""
        return paired_difference(
            [1e3 * each for each in self.profile], [1e3 * each for each in self.without]
        )

    def line(self) -> tuple[object, ...]:
        """Return the cells of the table."""
        difference = self.difference()
        return (
            self.pool,
            f"{fmean(self.without) * 1e3:.1f}",
            f"{fmean(self.profile) * 1e3:.1f}",
            difference,
            f"{difference.mean / 10:.2f}",
        )


class WaitingWorker(BenchWorker):
    """A worker whose tasks wait, and that can be asked for them."""

    APP = "bench_waits"

    @contextmanager
    def waiting(self, running: int) -> Iterator[None]:
        """Start the worker and ``running`` tasks that wait. They end with the block."""
        with self.open():
            self._release(running, "bench.waits")
            until(lambda: len(self.ask()["tasks"]) == running, "the tasks", timeout=_TIMEOUT)
            try:
                yield
            finally:
                (self._home / "end").touch()

    def ask(self, verb: str = TASKS, **parameters: object) -> dict[str, Any]:
        """Send a request to the agent's socket and return the answer."""
        path = next((self._home / "agent").glob("agent-*.sock"))
        answer = ControlClient("bare", self.meter.pid, path).request(verb, 10.0, parameters)
        if "error" in answer:
            raise HarnessError(f"the agent answered: {answer['error']}")
        return answer

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``z4j-bare`` on the agent's home."""
        return subprocess.Popen(
            [sys.executable, "-m", "z4j_bare", *arguments],
            env=worker_environment({"Z4J_HOME": str(self._home / "agent")}),
            stdout=subprocess.DEVNULL,
        )

    def is_profiled(self) -> bool:
        """Return whether a profile runs."""
        return bool(self.ask(HUB)["profiling"])

    def feed(self, number: int) -> None:
        """Release ``number`` short tasks."""
        self._release(number)

    @contextmanager
    def recorded(self) -> Iterator[dict[str, Any]]:
        """Record the hub's steps in the block; yield a dictionary that is filled after it."""
        found: dict[str, Any] = {}
        (self._home / "record").touch()
        time.sleep(1.0)  # the recorder starts within 0.1 s
        yield found
        (self._home / "record").unlink()
        result = self._home / "steps.json"
        until(result.exists, "the recorder of steps", timeout=_TIMEOUT)
        found.update(json.loads(result.read_text()))
        result.unlink()

    def longest_lag(self, began: float, ended: float) -> float:
        """Return the longest lag of the ticker in a span of time."""
        return quantile(self.lags_between(began, ended), 1.0)


def _ask(
    peers: Peers, pool: str, running: int, core: int | None, args: argparse.Namespace
) -> Asked:
    peers.purge()
    plan = Plan(concurrency=running + 10, core=core, probes=0, row_timeout=_ROW_TIMEOUT)
    worker = WaitingWorker(peers, plan, "ours", pool, sys.executable)
    with worker.waiting(running):
        worker.start_ticker()
        began = time.monotonic()
        time.sleep(_QUIET_SECONDS)
        quiet = worker.longest_lag(began, time.monotonic())
        answer = worker.ask(stack=True)
        _check(answer, running)
        began = time.monotonic()
        with worker.recorded() as steps:
            answers = [_seconds(lambda: worker.ask(stack=True)) for _ in range(args.requests)]
            commands = [
                _seconds(lambda: _succeed(worker.command("tasks", "--stack")))
                for _ in range(args.commands)
            ]
        lag = worker.longest_lag(began, time.monotonic())
    return Asked(
        pool,
        running,
        commands,
        answers,
        len(json.dumps(answer)),
        None if pool == "threads" else steps["longest"],
        steps["place"],
        steps["longest_collection"],
        lag,
        quiet,
    )


def _check(answer: dict[str, Any], running: int) -> None:
    """Raise ``HarnessError`` if a task is missing, or without its stack."""
    found = [task for task in answer["tasks"] if "_call" in (task["position"] or "")]
    if len(found) != running or min(len(task["stack"]) for task in found) < 12:
        raise HarnessError(f"{len(found)} of {running} running tasks have the right position")


def _profile(peers: Peers, pool: str, core: int | None, args: argparse.Namespace) -> Profiled:
    peers.purge()
    plan = Plan(concurrency=_PROFILED_TASKS + 100, core=core, probes=0, row_timeout=_ROW_TIMEOUT)
    workers = [
        WaitingWorker(peers, plan, "ours", pool, sys.executable, database) for database in range(2)
    ]
    found = Profiled(pool, [], [])
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.waiting(_PROFILED_TASKS))
        for window in range(args.windows):
            progress(f"{pool}: profile {window + 1}")
            mine, other = workers[window % 2], workers[1 - window % 2]
            command = mine.command("hub", "--profile", str(args.profile))
            if pool != "threads":  # without a hub there is nothing to profile
                until(mine.is_profiled, "the profile", timeout=_TIMEOUT)
            cpu = _cpu_rates((mine, other), args)
            _succeed(command)
            found.profile.append(cpu[0])
            found.without.append(cpu[1])
            answer = mine.ask(HUB, result=True)
            if answer["has_hub"] and answer["profile"]["running"]:
                raise HarnessError("the profile still runs after its command has ended")
    return found


def _cpu_rates(workers: Sequence[WaitingWorker], args: argparse.Namespace) -> tuple[float, ...]:
    """Give all workers the same tasks while a profile runs; return the CPU seconds a second.

    The measurement ends shortly before the profile.
    """
    began = [worker.meter.read() for worker in workers]
    group, deadline = int(args.rate * _GROUP_INTERVAL), time.monotonic() + 0.95 * args.profile
    while (now := time.monotonic()) < deadline:
        for worker in workers:
            if group:
                worker.feed(group)
        time.sleep(max(0.0, min(deadline, now + _GROUP_INTERVAL) - time.monotonic()))
    ended = [worker.meter.read() for worker in workers]
    return tuple(
        (after.cpu - before.cpu) / (after.at - before.at)
        for before, after in zip(began, ended, strict=True)
    )


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _succeed(command: subprocess.Popen[bytes]) -> None:
    if code := command.wait(_TIMEOUT):
        raise HarnessError(f"the command ended with exit code {code}")
