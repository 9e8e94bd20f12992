"""Growth over time: events at a constant rate with reconnects.

Memory, descriptors, greenlets and files must not grow.

The first half runs against a scripted peer that acknowledges at once and closes the connection now
and then, the second against the real brain at half its ingest rate, shared by all modes. Slopes are
least squares over all samples but the first fifth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self

from benchmarks.crash import MODES
from benchmarks.ingest import Feed
from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from tests.support.peer import PROJECT, SECRET_TEXT, TOKEN, Peer
from z4j_bare.concurrency.threads import ThreadsConcurrency
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.rest import Credentials
from z4j_bare.demo.worker import worker_environment

if TYPE_CHECKING:
    from types import TracebackType

HOST = Path(__file__).with_name("inside") / "bench_soak.py"
AGAINST = ("peer", "brain")

#: Measured values: key of the sample, title, unit in bytes or pieces.
FIGURES = (
    ("rss", "RSS (MiB)", 1 << 20),
    ("fds", "descriptors", 1),
    ("threads", "native threads", 1),
    ("greenlets", "greenlets", 1),
    ("file", "buffer files (MiB)", 1 << 20),
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
    parser.add_argument("--against", nargs="+", choices=AGAINST, default=list(AGAINST))
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


def run(args: argparse.Namespace) -> None:
    """Run all hosts; print the slopes, save samples and picture.

    Raises ``HarnessError`` if an event was not acknowledged.
    """
    before = circumstances()
    found: dict[str, list[Host]] = {}
    try:
        for name in args.against:
            found[name] = _run_against_peers(args) if name == "peer" else _run_against_brain(args)
    finally:
        _publish(args, before, found)
    if lossy := [host.title for hosts in found.values() for host in hosts if not host.complete]:
        raise HarnessError(f"not every event was acknowledged: {', '.join(lossy)}")


class Host:
    """One host in a subprocess and the samples that it prints; a context manager."""

    def __init__(
        self,
        mode: str,
        against: str,
        rate: float,
        args: argparse.Namespace,
        agent: Credentials,
        home: Path,
    ) -> None:
        self.title = f"{mode}, {against}"
        self.rate = rate
        self.samples: list[dict[str, Any]] = []
        self._seconds = args.minutes * 60
        root = str(HOST.parents[2])
        extra = {**agent.env(home), "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
        numbers = (rate, self._seconds, args.reconnect)
        self._process = subprocess.Popen(
            [sys.executable, str(HOST), mode, *map(str, numbers)],
            env=worker_environment(extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # warnings about sessions that end on purpose
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def complete(self) -> bool:
        """Whether all produced events were acknowledged and none was lost, by the last sample."""
        last: dict[str, Any] = (
            self.samples[-1] if self.samples else {"produced": 1, "acked": 0, "lost": {}}
        )
        return bool(last["acked"] >= last["produced"]) and not last["lost"]

    def after_warm_up(self, key: str) -> tuple[list[float], list[float]]:
        """Return times in minutes and the values of one key after the warm-up."""
        end = self.samples[-1]["at"]
        kept = [
            each for each in self.samples if each["at"] >= end * _WARM_UP and each[key] is not None
        ]
        return [each["at"] / 60 for each in kept], [float(each[key]) for each in kept]

    def wait(self) -> None:
        """Wait for the end of the subprocess."""
        self._reader.join(self._seconds + 180)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.samples.append(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(5.0)


class AcknowledgingPeer(Peer):  # type: ignore[misc]
    """Acknowledges at once and keeps no frames."""

    def on_frame(self, session: Any, frame: Any) -> None:
        """React to the frame and drop it."""
        super().on_frame(session, frame)
        session.frames.clear()


def _run_against_peers(args: argparse.Namespace) -> list[Host]:
    """Run each mode against a peer, which closes connections halfway between two reconnects."""
    with tempfile.TemporaryDirectory(prefix="z4j-soak-") as name, ExitStack() as stack:
        folder = Path(name)
        peers = [AcknowledgingPeer(ThreadsConcurrency()) for _ in args.modes]
        for peer in peers:
            stack.callback(peer.stop)
        hosts = []
        for mode, peer in zip(args.modes, peers, strict=True):
            agent = Credentials(peer.url, PROJECT, "", TOKEN, SECRET_TEXT)
            hosts.append(
                stack.enter_context(Host(mode, "peer", args.rate, args, agent, folder / mode))
            )
        progress(f"{args.minutes:g} minutes against scripted peers")
        time.sleep(args.reconnect / 2)
        ends = time.monotonic() + args.minutes * 60 - args.reconnect
        while time.monotonic() < ends:
            for peer in peers:
                if peer.last:
                    peer.last.drop()
            time.sleep(args.reconnect)
        for host in hosts:
            host.wait()
    return hosts


def _run_against_brain(args: argparse.Namespace) -> list[Host]:
    """Run all modes against one brain at half its ingest rate."""
    with ExitStack() as stack, Peers() as peers:
        rate = Feed(peers.new_agent("ingest")).rate(_CALIBRATION, 500)
        share = rate / 2 / len(args.modes)
        progress(f"{args.minutes:g} minutes against the brain: {share:.0f} events/s per host")
        hosts = []
        for mode in args.modes:
            agent = peers.new_agent(f"soak-{mode}")
            hosts.append(
                stack.enter_context(
                    Host(mode, "brain", share, args, agent, peers.home / f"soak-{mode}")
                )
            )
        for host in hosts:
            host.wait()
    return hosts


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


def _publish(
    args: argparse.Namespace, before: dict[str, Any], found: dict[str, list[Host]]
) -> None:
    hosts = [host for each in found.values() for host in each if host.samples]
    if not hosts:
        return
    titles = [f"{title}: last, per minute" for _, title, _ in FIGURES]
    print(
        table(
            ("host", "events/s", "events", "sessions", *titles, "CPU %", "acked"),
            [_line(host) for host in hosts],
        )
    )
    content = {
        **before,
        "options": {key: value for key, value in vars(args).items() if key != "name"},
        "slopes_per_minute": {
            host.title: {key: slope(*host.after_warm_up(key)) for key, _, _ in FIGURES}
            for host in hosts
        },
        "samples": {host.title: host.samples for host in hosts},
    }
    path = save("soak", content)
    _draw(path.with_suffix(".png"), hosts)
    print(f"saved {path} and {path.with_suffix('.png').name}")


def _line(host: Host) -> tuple[object, ...]:
    last = host.samples[-1]
    figures = []
    for key, _, unit in FIGURES:
        moments, values = host.after_warm_up(key)
        figures.append(
            f"{values[-1] / unit:.4g}, {slope(moments, values) / unit:+.3f}" if values else "-"
        )
    cpu = f"{100 * last['cpu'] / last['at']:.1f}"
    acked = (
        "all" if host.complete else f"{last['acked']} of {last['produced']}, lost {last['lost']}"
    )
    return host.title, f"{host.rate:.0f}", last["produced"], last["sessions"], *figures, cpu, acked


def _draw(path: Path, hosts: Sequence[Host]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(FIGURES), figsize=(4 * len(FIGURES), 3.6))
    for panel, (key, title, unit) in zip(panels, FIGURES, strict=True):
        for host in hosts:
            kept = [
                (each["at"] / 60, each[key] / unit)
                for each in host.samples
                if each[key] is not None
            ]
            panel.plot(*zip(*kept, strict=True), label=host.title, linewidth=1)
        panel.set_title(title)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
