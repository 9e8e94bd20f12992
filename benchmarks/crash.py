"""Hosts killed while they store, send, hear of acks, delete and adopt.

What of their events the real brain has in the end.

Blocks of one mode each: every host inherits what the one before it left, the last one sends the
rest, and then the brain is asked for every event. With ``--compare``: how long an ended Celery
worker's backlog takes, beside the existing agent.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import outage
from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from tests.support.crash_harness import Death, Verdict, Victims, judge, plan
from z4j_bare.demo.process import HarnessError

MODES = ("threads", "gevent", "eventlet")
_PATIENCE = 600.0  # seconds for the last host to send the rest
_HEADER = (
    "mode",
    "killed",
    "at the point",
    "recorded",
    "committed",
    "told",
    "missing",
    "doubled",
    "overtaken",
    "damaged",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument(
        "--trials",
        type=int,
        default=1000,
        help="hosts killed, over all modes (default: %(default)s)",
    )
    parser.add_argument(
        "--events", type=int, default=102, help="each records (default: %(default)s)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--block", type=int, default=50, help="hosts of one mode in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another one dies elsewhere (default: %(default)s)"
    )
    outage.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run all trials; print and save the table.

    ``HarnessError`` when an event was lost or doubled, or a file damaged.
    """
    if args.compare:
        outage.run(args)
        return
    before = circumstances()
    blocks: list[Block] = []
    try:
        with Peers() as peers:
            for number, (mode, trials) in enumerate(_blocks(args.trials, args.block, args.modes)):
                block = Block(mode, number)
                blocks.append(block)
                block.run(peers, trials, args)
                progress(
                    f"block {number + 1}: {trials} {mode} killed in {block.seconds:.0f} s, faults: {block.faults}"
                )
    finally:
        _publish(args, before, blocks)
    if faults := sum(block.faults for block in blocks):
        raise HarnessError(f"{faults} events or files are not as promised; the JSON names them")


@dataclass
class Block:
    """Some hosts of one mode, each the heir of the one before it.

    ``seconds`` are for the killing, without the asking.
    """

    mode: str
    number: int
    deaths: list[Death] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        """How many events are missing or doubled, and how many files were damaged."""
        return sum(len(verdict.faults) for verdict in self.verdicts) + sum(
            len(death.corrupt) for death in self.deaths
        )

    def run(self, peers: Peers, trials: int, args: argparse.Namespace) -> None:
        """Kill them one after the other, let a last one send the rest, and judge each."""
        agent = peers.new_agent(f"crash-{self.mode}")
        home = peers.home / f"crash-{self.number}"
        home.mkdir()
        began = time.monotonic()
        with Victims(self.mode, agent, home) as victims:
            for trial in plan(trials, args.events, seed=1000 * args.seed + self.number):
                self.deaths.append(victims.kill(trial))
            victims.bury(_PATIENCE)
        self.seconds = time.monotonic() - began
        rows = {row["task_id"]: row for row in peers.brain.tasks(agent.project)}
        self.verdicts = [judge(peers.brain, agent.project, death, rows) for death in self.deaths]


def _blocks(trials: int, size: int, modes: list[str]) -> Iterator[tuple[str, int]]:
    """Yield ``(mode, trials)``; the modes take turns."""
    turn = 0
    while trials > 0:
        yield modes[turn % len(modes)], min(size, trials)
        trials -= size
        turn += 1


def _publish(args: argparse.Namespace, before: dict[str, Any], blocks: list[Block]) -> None:
    done = [block for block in blocks if block.verdicts]
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
        death.trial.point if death.reached else "elsewhere"
        for block in done
        for death in block.deaths
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
    deaths = [death for block in blocks for death in block.deaths]
    verdicts = [verdict for block in blocks for verdict in block.verdicts]
    return (
        mode,
        len(deaths),
        sum(death.reached for death in deaths),
        sum(death.trial.events for death in deaths),
        sum(death.committed for death in deaths),
        sum(verdict.told for verdict in verdicts),
        sum(len(verdict.missing) + len(verdict.stray) for verdict in verdicts),
        sum(len(verdict.doubled) for verdict in verdicts),
        sum(len(verdict.overtaken) for verdict in verdicts),
        sum(len(death.corrupt) for death in deaths),
    )
