"""Growth over time: events at a constant rate with reconnects, restarts and a full disk.

Memory, descriptors, threads, greenlets and files must not grow, and no event may be lost silently.

The first part runs against scripted peers that acknowledge at once and close the connections now
and then, the second against the real brain, by default at half its ingest rate, shared by all
modes. Each mode has two hosts that share a home: one runs all the time, the other one is stopped
and killed in turn. Slopes are least squares over all samples of the first one but the first fifth.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.crash import MODES
from benchmarks.databases import DATABASES, query, running_brain
from benchmarks.environments import OUT
from benchmarks.ingest import Feed
from benchmarks.peers import progress
from benchmarks.report import circumstances, save, table
from benchmarks.soak_hosts import (
    Account,
    Disk,
    Host,
    Pair,
    Site,
    account,
    numbers_by_host,
    schedule,
    unexplained,
)
from tests.support.peer import PROJECT, SECRET_TEXT, TOKEN, Peer
from z4j_bare.concurrency.threads import ThreadsConcurrency
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.rest import Credentials

if TYPE_CHECKING:
    from collections.abc import Callable

AGAINST = ("peer", "brain")

#: Measured values: key in a sample, title, and the divisor that converts the value to the unit.
FIGURES = (
    ("rss", "RSS (MiB)", 1 << 20),
    ("fds", "descriptors", 1),
    ("threads", "native threads", 1),
    ("greenlets", "greenlets", 1),
    ("file", "buffer files (MiB)", 1 << 20),
    ("files", "files", 1),
)
_CALIBRATION = 3000
_WARM_UP = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="duration against each peer (default: %(default)s)",
    )
    parser.add_argument(
        "--rate", type=float, default=500.0, help="events/s against the peer (default: %(default)s)"
    )
    parser.add_argument(
        "--brain-rate",
        type=float,
        default=0.0,
        help="events/s against the brain (default: half of what it accepts, for all modes)",
    )
    parser.add_argument("--against", nargs="+", choices=AGAINST, default=list(AGAINST))
    parser.add_argument("--database", choices=DATABASES, default="sqlite", help="of the brain")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=list(MODES),
        help="modes that run at the same time",
    )
    parser.add_argument(
        "--reconnect",
        type=float,
        default=20.0,
        help="seconds between two sessions (default: %(default)s)",
    )
    parser.add_argument(
        "--restart",
        type=float,
        default=70.0,
        help="seconds between two ends of the second host, a kill and a stop in turn; "
        "0: no second host (default: %(default)s)",
    )
    parser.add_argument(
        "--full-disk",
        type=float,
        default=180.0,
        help="seconds between two periods of 40 s with a full disk; 0: never, "
        "where namespaces are not allowed (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Run all hosts; print the slopes and the events, save samples and picture.

    Raises ``HarnessError`` if an event was lost silently or is twice in the brain.
    """
    before = circumstances()
    found: list[Outcome] = []
    try:
        for name in args.against:
            run_part = _run_against_peers if name == "peer" else _run_against_brain
            found += run_part(args)
    finally:
        _publish(args, before, found)
    if faulty := [each.title for each in found if each.faults]:
        raise HarnessError(f"events were lost silently or doubled: {', '.join(faulty)}")


@dataclass
class Outcome:
    """The hosts of one mode after a run, and what became of their events.

    ``doubled`` counts events that the brain stored twice. It is 0 for a peer, which may receive an
    event twice.
    """

    title: str
    steady: Host
    accounts: list[Account]
    doubled: int
    files: list[str]

    @property
    def faults(self) -> int:
        """The number of events that were lost silently or doubled."""
        return unexplained(self.accounts) + self.doubled

    def after_warm_up(self, key: str) -> tuple[list[float], list[float]]:
        """Return times in minutes and the values of one key after the warm-up."""
        samples = self.steady.samples
        end = samples[-1]["at"]
        kept = [each for each in samples if each["at"] >= end * _WARM_UP and each[key] is not None]
        return [each["at"] / 60 for each in kept], [float(each[key]) for each in kept]


class AcknowledgingPeer(Peer):  # type: ignore[misc]
    """Acknowledges at once. Keeps task id and kind of each event, but no frames."""

    def __init__(self) -> None:
        super().__init__(ThreadsConcurrency())
        self.arrived: Counter[tuple[str, str]] = Counter()

    def on_frame(self, session: Any, frame: Any) -> None:
        """Count the events, handle the frame and drop it."""
        if frame.type == "event_batch":
            self.arrived.update((each["task_id"], each["kind"]) for each in frame.payload.events)
        super().on_frame(session, frame)
        session.frames.clear()

    def drop(self) -> None:
        """Close all connections."""
        for session in self.live:
            session.drop()


def _run_against_peers(args: argparse.Namespace) -> list[Outcome]:
    """Run each mode against a peer, which closes connections halfway between two reconnects."""
    with tempfile.TemporaryDirectory(prefix="z4j-soak-") as name, ExitStack() as stack:
        peers = [AcknowledgingPeer() for _ in args.modes]
        for peer in peers:
            stack.callback(peer.stop)
        agents = [Credentials(peer.url, PROJECT, "", TOKEN, SECRET_TEXT) for peer in peers]
        progress(f"{args.minutes:g} minutes against scripted peers")
        pairs = _start(args, Path(name), agents, args.rate, stack)

        def drop() -> None:
            for peer in peers:
                peer.drop()

        _follow(args, pairs, drop)
        events = [event for peer in peers for event in peer.arrived.elements()]
    return _outcomes("peer", pairs, events, stores=False)


def _run_against_brain(args: argparse.Namespace) -> list[Outcome]:
    """Run all modes against one brain."""
    with tempfile.TemporaryDirectory(prefix="z4j-soak-") as name, ExitStack() as stack:
        home = Path(name)
        brain = stack.enter_context(running_brain(args.database, home / "brain"))
        projects = ["ingest", *(f"soak-{mode}" for mode in args.modes)]
        for project in projects:
            brain.create_project(project)
        first, *agents = [brain.mint_agent(project, project) for project in projects]
        rate = args.brain_rate or Feed(first).rate(_CALIBRATION, 500) / 2 / len(args.modes)
        progress(f"{args.minutes:g} minutes against the brain on {args.database}: {rate:.0f}/s")
        pairs = _start(args, home, agents, rate, stack)
        _follow(args, pairs, None)
        events = query(brain, "SELECT task_id, kind FROM events WHERE task_id LIKE '%-%-%'")
    kept = [(str(task_id), str(kind)) for task_id, kind in events]
    return _outcomes(args.database, pairs, kept, stores=True)


def _start(
    args: argparse.Namespace,
    home: Path,
    agents: Sequence[Credentials],
    rate: float,
    stack: ExitStack,
) -> list[Pair]:
    OUT.mkdir(exist_ok=True)
    log = stack.enter_context((OUT / "soak-hosts.log").open("ab"))
    pairs = []
    for mode, agent in zip(args.modes, agents, strict=True):
        disk = stack.enter_context(Disk(home / mode)) if args.full_disk else None
        site = Site(mode, agent, home / mode, args.reconnect, log, disk)
        pair = Pair(site, rate, args.minutes * 60, restarted=args.restart > 0)
        pairs.append(stack.enter_context(pair))
    return pairs


def _follow(
    args: argparse.Namespace, pairs: Sequence[Pair], drop: Callable[[], None] | None
) -> None:
    """Apply the schedule to all hosts, and wait for their end."""
    began = time.monotonic()
    for moment, what in schedule(
        args.minutes * 60,
        drop=args.reconnect if drop else 0.0,
        restart=args.restart,
        full=args.full_disk,
    ):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        if what == "drop":
            if drop:
                drop()
            continue
        progress(f"{moment:.0f} s: {what}")
        _all(pairs, methodcaller("happen", what))
    time.sleep(max(0.0, began + args.minutes * 60 - time.monotonic()))
    _all(pairs, Pair.finish)


def _all(pairs: Sequence[Pair], action: Callable[[Pair], None]) -> None:
    """Call ``action`` with all pairs at the same time."""
    with ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(action, pairs))


def _outcomes(
    name: str, pairs: Sequence[Pair], events: Iterable[tuple[str, str]], *, stores: bool
) -> list[Outcome]:
    arrived = numbers_by_host(events)
    outcomes = []
    for pair in pairs:
        left = numbers_by_host(pair.left)
        accounts = [
            account(
                host.name,
                host.end,
                host.last,
                arrived.get(host.name, ()),
                left.get(host.name, ()),
            )
            for host in pair.hosts
        ]
        repeated = sum(
            number - 1 for host in pair.hosts for number in arrived.get(host.name, {}).values()
        )
        outcomes.append(
            Outcome(f"{pair.mode}, {name}", pair.steady, accounts, repeated * stores, pair.files)
        )
    return outcomes


def slope(moments: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope; 0 for fewer than two samples."""
    if len(values) < 2:
        return 0.0
    middle, mean = fmean(moments), fmean(values)
    spread = sum((moment - middle) ** 2 for moment in moments)
    return (
        sum(
            (moment - middle) * (value - mean)
            for moment, value in zip(moments, values, strict=True)
        )
        / spread
    )


def _publish(args: argparse.Namespace, before: dict[str, Any], found: Sequence[Outcome]) -> None:
    outcomes = [each for each in found if each.steady.samples]
    if not outcomes:
        return
    titles = [f"{title}: last, per minute" for _, title, _ in FIGURES]
    header = ("host", "events/s", "minutes", "sessions", *titles, "CPU %")
    print(table(header, [_line(each) for each in outcomes]), end="\n\n")
    print(table(_EVENTS_HEADER, [_events_line(each) for each in outcomes]))
    content = {
        **before,
        "options": {key: value for key, value in vars(args).items() if key != "name"},
        "slopes_per_minute": {
            each.title: {key: slope(*each.after_warm_up(key)) for key, _, _ in FIGURES}
            for each in outcomes
        },
        "accounts": {each.title: [asdict(one) for one in each.accounts] for each in outcomes},
        "files": {each.title: each.files for each in outcomes},
        "samples": {each.title: each.steady.samples for each in outcomes},
    }
    path = save("soak", content)
    _draw(path.with_suffix(".png"), outcomes)
    print(f"saved {path} and {path.with_suffix('.png').name}")


def _line(outcome: Outcome) -> tuple[object, ...]:
    host, last = outcome.steady, outcome.steady.samples[-1]
    figures = []
    for key, _, unit in FIGURES:
        moments, values = outcome.after_warm_up(key)
        figures.append(
            f"{values[-1] / unit:.4g}, {slope(moments, values) / unit:+.3f}" if values else "-"
        )
    cpu = f"{100 * last['cpu'] / last['at']:.1f}"
    minutes = f"{last['at'] / 60:.1f}"
    return outcome.title, f"{host.rate:.0f}", minutes, last["sessions"], *figures, cpu


_EVENTS_HEADER = (
    *("hosts", "processes", "stopped", "killed", "must arrive", "arrived", "buffered", "missing"),
    *("reported", "missing silently", "doubled", "times without disk", "files left"),
)


def _events_line(outcome: Outcome) -> tuple[object, ...]:
    accounts = outcome.accounts
    ends = Counter(each.end for each in accounts)
    lost: Counter[str] = Counter()
    for each in accounts:
        lost.update(each.lost)
    return (
        outcome.title,
        len(accounts),
        ends["stop"],
        ends["kill"],
        sum(each.expected for each in accounts),
        sum(each.arrived for each in accounts),
        sum(each.buffered for each in accounts),
        sum(len(each.missing) for each in accounts),
        ", ".join(f"{reason} {number}" for reason, number in sorted(lost.items())) or 0,
        unexplained(accounts),
        outcome.doubled,
        outcome.steady.samples[-1]["buffer_failures"],
        len(outcome.files),
    )


def _draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(FIGURES), figsize=(4 * len(FIGURES), 3.6))
    for panel, (key, title, unit) in zip(panels, FIGURES, strict=True):
        for outcome in outcomes:
            kept = [
                (each["at"] / 60, each[key] / unit)
                for each in outcome.steady.samples
                if each[key] is not None
            ]
            panel.plot(*zip(*kept, strict=True), label=outcome.title, linewidth=1)
        panel.set_title(title)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
