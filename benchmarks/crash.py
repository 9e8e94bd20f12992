"""Kills agent processes at all stages of an event, and checks what the brain has in the end.

In mode ``prefork`` the parent or a child of a Celery worker is killed, at the calls of the channel
between them.
Each process of a block adopts the rows of the one before, and the last one sends the rest. With
``--compare``: the time to send the backlog of an ended Celery worker, beside the asyncio agent.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks import outage
from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from tests.support import crash_harness, prefork_crash
from tests.support.crash_harness import CrashHarness, Delivery, Kill
from tests.support.prefork_crash import PreforkDelivery, PreforkHarness, PreforkKill
from z4j_bare.demo.process import HarnessError

if TYPE_CHECKING:
    from z4j_bare.demo.rest import Credentials

MODES = ("threads", "gevent", "eventlet")
PREFORK = "prefork"
#: Seconds for the last process to send all rows.
_UPLOAD_TIMEOUT = 600.0
_HEADER = (
    "mode",
    "killed",
    "at the point",
    "recorded",
    "committed",
    "received",
    "missing",
    "duplicated",
    "reordered",
    "lost runs",
    "damaged",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument(
        "--trials",
        type=int,
        default=1000,
        help="processes to kill, over all modes (default: %(default)s)",
    )
    parser.add_argument(
        "--events",
        type=int,
        default=102,
        help="events per process without Celery (default: %(default)s)",
    )
    modes = [*MODES, PREFORK]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument(
        "--block",
        type=int,
        default=50,
        help="processes of one mode in a row (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="blocks that run at the same time, each with hosts of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random kill points (default: %(default)s)"
    )
    outage.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run all trials; print and save the table.

    Raises ``HarnessError`` if an event was lost or doubled, or a file was damaged.
    """
    if args.compare:
        outage.run(args)
        return
    before = circumstances()
    blocks: list[Block] = []
    ended = threading.Event()
    try:
        with Peers() as peers, ThreadPoolExecutor(args.jobs) as pool:
            jobs = []
            for number, (mode, trials) in enumerate(_blocks(args.trials, args.block, args.modes)):
                block = Block(mode, number)
                blocks.append(block)
                agent = peers.new_agent(f"crash-{mode}")
                jobs.append(pool.submit(block.run, peers, agent, trials, args, ended))
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                # The running blocks kill no more hosts, but send and verify what they have.
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        _publish(args, before, blocks)
    if faults := sum(block.faults for block in blocks):
        raise HarnessError(f"{faults} events or files have faults; see the saved JSON")


@dataclass
class Block:
    """Processes of one mode. ``seconds`` is the duration of the kills without the check."""

    mode: str
    number: int
    kills: list[Kill | PreforkKill] = field(default_factory=list)
    deliveries: list[Delivery | PreforkDelivery] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        """The number of missing or duplicated events and of damaged files."""
        return sum(len(delivery.faults) for delivery in self.deliveries) + sum(
            len(kill.corrupt) for kill in self.kills
        )

    def run(
        self,
        peers: Peers,
        agent: Credentials,
        trials: int,
        args: argparse.Namespace,
        ended: threading.Event,
    ) -> None:
        """Kill the processes in turn, send the remaining rows, and verify all events.

        :param ended: set if the run is to end early.
        """
        home = peers.home / f"crash-{self.number}"
        home.mkdir()
        seed = 1000 * args.seed + self.number
        prefork = self.mode == PREFORK
        planned = (
            prefork_crash.plan(trials, seed)
            if prefork
            else crash_harness.plan(trials, args.events, seed)
        )
        began = time.monotonic()
        with (
            PreforkHarness(agent, home, peers.broker())
            if prefork
            else CrashHarness(self.mode, agent, home)
        ) as harness:
            for trial in planned:
                if ended.is_set():
                    break
                self.kills.append(harness.kill(trial))
            harness.upload_rest(_UPLOAD_TIMEOUT)
        self.seconds = time.monotonic() - began
        verify = prefork_crash.verify if prefork else crash_harness.verify
        with closing(peers.brain.clone()) as brain:  # a session serves one thread
            rows = {row["task_id"]: row for row in brain.tasks(agent.project)}
            self.deliveries = [verify(brain, agent.project, kill, rows) for kill in self.kills]
        progress(
            f"block {self.number + 1}: {len(self.kills)} {self.mode} killed "
            f"in {self.seconds:.0f} s, faults: {self.faults}"
        )


def _blocks(trials: int, size: int, modes: list[str]) -> Iterator[tuple[str, int]]:
    """Yield ``(mode, trials)`` with the modes in turn."""
    turn = 0
    while trials > 0:
        yield modes[turn % len(modes)], min(size, trials)
        trials -= size
        turn += 1


def _publish(args: argparse.Namespace, before: dict[str, Any], blocks: list[Block]) -> None:
    done = [block for block in blocks if block.deliveries]
    if not done:
        return
    print(
        table(
            _HEADER,
            [
                _line(mode, [each for each in done if mode in (each.mode, "all")])
                for mode in _titles(done)
            ],
        )
    )
    kills = Counter(
        f"{block.mode} {kill.trial.point}" if kill.reached else "elsewhere"
        for block in done
        for kill in block.kills
    )
    print("killed at: " + ", ".join(f"{point} {number}" for point, number in sorted(kills.items())))
    content = {
        **before,
        "options": {key: value for key, value in vars(args).items() if key != "name"},
        "kills": kills,
        "blocks": [asdict(block) for block in done],
    }
    print(f"saved {save('crash', content)}")


def _titles(blocks: list[Block]) -> list[str]:
    modes = list(dict.fromkeys(block.mode for block in blocks))
    return [*modes, "all"] if len(modes) > 1 else modes


def _line(mode: str, blocks: list[Block]) -> tuple[object, ...]:
    kills = [kill for block in blocks for kill in block.kills]
    deliveries = [delivery for block in blocks for delivery in block.deliveries]
    return (
        mode,
        len(kills),
        sum(kill.reached for kill in kills),
        sum(kill.trial.events for kill in kills),
        sum(kill.committed for kill in kills),
        sum(delivery.received for delivery in deliveries),
        sum(len(delivery.missing) + len(delivery.unexpected) for delivery in deliveries),
        sum(len(delivery.duplicated) for delivery in deliveries),
        sum(len(delivery.reordered) for delivery in deliveries),
        sum(len(getattr(delivery, "lost_runs", ())) for delivery in deliveries),
        sum(len(kill.corrupt) for kill in kills),
    )
