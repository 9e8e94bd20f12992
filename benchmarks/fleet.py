"""Many agents and one brain: who is online, what arrives and when, what an agent costs.

Each agent is a light process of its own. ``--backlog`` lets every agent begin with stored events,
which all are sent from the same moment on; the time is compared with that of one agent alone in the
same run. ``--restart`` restarts the brain in the middle of the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Self

from benchmarks.databases import DATABASES, query, running_brain
from benchmarks.peers import progress
from benchmarks.report import circumstances, save, table
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import worker_environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from z4j_bare.demo.brain import Brain
    from z4j_bare.demo.rest import Credentials

SCRIPT = Path(__file__).with_name("inside") / "bench_fleet.py"
PROJECT = "fleet"

#: Minimum number of events from which the rate of one agent is calculated.
CALIBRATION_EVENTS = 1500
#: Seconds for the processes to start and to store their backlog.
START_TIMEOUT = 120.0
#: Seconds after the end of the recording in which all events must arrive.
DRAIN_TIMEOUT = 240.0
#: Text in the brain's log line about a frame that it skips.
SKIPPED = "withholding ack"


@dataclass(frozen=True)
class Plan:
    """One host: its settings, events before the first connect, then ``rate`` for ``seconds``."""

    environment: dict[str, str]
    backlog: int
    rate: float
    seconds: float


class Board:
    """The current numbers of all hosts, in a file mapped by their processes and by this process."""

    _ROW = struct.Struct("=qq?q")

    def __init__(self, path: Path, hosts: int) -> None:
        self._folder = path.parent
        self._hosts = hosts
        size = hosts * self._ROW.size
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)

    def write(self, host: int, produced: int, acked: int, online: bool, changes: int) -> None:
        """Publish the numbers of one host."""
        self._ROW.pack_into(self._map, host * self._ROW.size, produced, acked, online, changes)

    def read(self) -> list[tuple[int, int, bool, int]]:
        """Return produced events, acknowledged events, online and session changes of each host."""
        return [
            self._ROW.unpack_from(self._map, host * self._ROW.size) for host in range(self._hosts)
        ]

    def touch(self, name: str) -> None:
        """Tell all hosts to ``connect`` or to ``stop``, by a file with this name."""
        (self._folder / name).touch()

    def exists(self, name: str) -> bool:
        """Whether :meth:`touch` was called with this name."""
        return (self._folder / name).exists()


@dataclass
class Result:
    """What a host wrote at its end; see ``bench_fleet.py``. Times are monotonic seconds."""

    produced: int
    acks: list[tuple[float, int]]
    delays: list[float]
    sessions: list[tuple[float, str | None, str]]
    cpu_ms_per_second: float
    pss_mb: float
    stats: dict[str, Any]

    def back_after(self, moment: float) -> float:
        """Return the start of the first session after ``moment``."""
        return next((at for at, session, _ in self.sessions if session and at > moment), 1e9)


class Fleet:
    """Hosts in processes of their own; a context manager.

    :param home: a new directory.
    """

    def __init__(self, home: Path, plans: Sequence[Plan]) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.plans = plans
        self.board = Board(home / "board", len(plans))
        self._home = home
        self._log = (home / "template.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(home / "board")],
            env=worker_environment({"PYTHONWARNINGS": "ignore"}),
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def start(self) -> None:
        """Start all hosts and wait until their backlogs are stored."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise HarnessError("the hosts have no pipes")
        stdin.write(json.dumps([asdict(plan) for plan in self.plans]) + "\n")
        stdin.flush()
        if not stdout.readline():
            raise HarnessError("the hosts did not start", log=self._home / "template.log")
        backlog = sum(plan.backlog for plan in self.plans)
        stored = lambda: sum(each[0] for each in self.board.read()) >= backlog  # noqa: E731
        until(stored, "the backlogs of all hosts", timeout=START_TIMEOUT, interval=0.2)

    def finish(self) -> list[Result]:
        """End all hosts and return their results."""
        self.board.touch("stop")
        self._process.wait(60 + len(self.plans))
        return [self._result(plan) for plan in self.plans]

    @staticmethod
    def _result(plan: Plan) -> Result:
        home = Path(plan.environment["Z4J_HOME"])
        path = home / "result.json"
        if not path.exists():
            raise HarnessError("a host wrote no result", log=home / "host.log")
        return Result(**json.loads(path.read_text()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.board.touch("stop")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--agents", type=int, default=10, help="default: %(default)s")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="events/s of each agent (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1, help="tokens that the agents share (default: %(default)s)"
    )
    parser.add_argument("--database", choices=DATABASES, default="postgresql")
    parser.add_argument(
        "--backlog", type=int, default=0, help="stored events of each agent before it connects"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="duration of --rate (default: %(default)s)"
    )
    parser.add_argument(
        "--restart", action="store_true", help="restart the brain in the middle of --seconds"
    )


def run(args: argparse.Namespace) -> None:
    """Run the fleet; print and save the figures.

    Raises ``HarnessError`` if an event was lost or doubled.
    """
    check_options(args)
    before = circumstances()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="z4j-fleet-")))
        brain = stack.enter_context(running_brain(args.database, home / "brain"))
        brain.create_project(PROJECT)
        trial = Trial(brain, home, args)
        alone = [trial.rate_of_one()] if args.backlog else []
        figures, results = trial.run()
        alone += [trial.rate_of_one()] if args.backlog else []
    if alone:
        figures |= _compare(alone, figures)
    _publish(args, before, figures, results)
    if figures["lost"] or figures["doubled"] or figures["in the brain"] != figures["produced"]:
        raise HarnessError("events were lost, doubled or did not arrive")


def check_options(args: argparse.Namespace) -> None:
    """Raise ``HarnessError`` for options with which the benchmark would measure nothing."""
    if not 1 <= args.tokens <= args.agents:
        raise HarnessError("--tokens must be at least 1 and at most --agents")
    if args.rate < 0 or args.backlog < 0 or args.seconds <= 0:
        raise HarnessError("--rate and --backlog must not be negative, --seconds must be positive")
    if not args.rate and not args.backlog:
        raise HarnessError("the agents have no events: give --rate or --backlog")
    if args.restart and not args.rate:
        raise HarnessError("--restart needs --rate: the restart is in the middle of --seconds")


class Trial:
    """One run of the fleet against a running brain."""

    def __init__(self, brain: Brain, home: Path, args: argparse.Namespace) -> None:
        self._brain = brain
        self._home = home
        self._args = args
        self._fleets = 0

    def rate_of_one(self) -> float:
        """Return the events/s of a single agent with a backlog and a token of its own."""
        events = max(CALIBRATION_EVENTS, self._args.backlog)
        progress(f"one agent alone: {events} events")
        with self._fleet([self._mint(f"alone-{self._fleets}")], 1, events, 0.0) as fleet:
            began = self._connect(fleet)
            self._wait_for_acks(fleet)
            acks = fleet.finish()[0].acks
        rate: float = events / (acks[-1][0] - began)
        return rate

    def run(self) -> tuple[dict[str, Any], list[Result]]:
        """Run all agents; return the figures and the results."""
        args, brain = self._args, self._brain
        agents = [self._mint(f"group-{number}") for number in range(args.tokens)]
        known, skipped = self._rows(), self._skipped()
        progress(f"{args.agents} agents on {args.tokens} tokens")
        with self._fleet(agents, args.agents, args.backlog, args.rate) as fleet:
            began = self._connect(fleet)
            online, restarted = 0, None
            end = began + (args.seconds if args.rate else 0.0)
            while time.monotonic() < end:
                online = max(online, sum(each[2] for each in fleet.board.read()))
                if args.restart and not restarted and time.monotonic() > (began + end) / 2:
                    restarted = self._restart()
                time.sleep(0.2)
            online = max(online, self._wait_for_acks(fleet))
            workers = brain.agent_workers(PROJECT)
            results = fleet.finish()
        rows, tasks = (now - then for now, then in zip(self._rows(), known, strict=True))
        figures = summary(results, began, restarted)
        figures |= {
            "online": online,
            "online in the brain": sum(row["state"] == "online" for row in workers),
            "in the brain": tasks,
            "doubled": rows - tasks,
            "skipped frames": self._skipped() - skipped,
        }
        return figures, results

    def _fleet(self, agents: Sequence[Credentials], count: int, backlog: int, rate: float) -> Fleet:
        self._fleets += 1
        home = self._home / f"fleet-{self._fleets}"
        seconds = self._args.seconds if rate else 0.0
        environments = [
            agent.env(home / f"agent-{number}")
            for number, agent in zip(range(count), itertools.cycle(agents), strict=False)
        ]
        return Fleet(home, [Plan(each, backlog, rate, seconds) for each in environments])

    def _connect(self, fleet: Fleet) -> float:
        fleet.start()
        fleet.board.touch("connect")
        return time.monotonic()

    def _wait_for_acks(self, fleet: Fleet) -> int:
        """Wait until all events are acknowledged; return the maximum number of agents online."""
        online, deadline = 0, time.monotonic() + DRAIN_TIMEOUT
        expected = [plan.backlog + int(plan.rate * plan.seconds) for plan in fleet.plans]
        while time.monotonic() < deadline:
            found = fleet.board.read()
            online = max(online, sum(each[2] for each in found))
            if all(each[1] >= number for each, number in zip(found, expected, strict=True)):
                break
            time.sleep(0.2)
        return online

    def _restart(self) -> tuple[float, float]:
        """Restart the brain; return when it was stopped and when it was ready again."""
        progress("the brain restarts")
        stopped = time.monotonic()
        self._brain.stop()
        self._brain.start()
        return stopped, time.monotonic()

    def _mint(self, name: str) -> Credentials:
        return self._brain.mint_agent(PROJECT, name)

    def _skipped(self) -> int:
        return self._brain.log.read_text(errors="replace").count(SKIPPED)

    def _rows(self) -> tuple[int, int]:
        """Return the number of events, and of tasks with an event, in the brain's database."""
        ((rows, tasks),) = query(
            self._brain, "SELECT count(*), count(DISTINCT task_id) FROM events"
        )
        return rows, tasks


def summary(
    results: Sequence[Result], began: float, restarted: tuple[float, float] | None
) -> dict[str, Any]:
    """Return the figures of a run.

    :param began: when the agents were allowed to connect.
    :param restarted: when the brain was stopped and when it was ready again, if it was restarted.
    """
    acks = sorted(ack for result in results for ack in result.acks)
    delays = sorted(delay for result in results for delay in result.delays)
    longest, last = pauses([at for at, _ in acks], restarted)
    figures: dict[str, Any] = {
        "produced": sum(result.produced for result in results),
        "acknowledged": sum(events for _, events in acks),
        "lost": sum(sum(result.stats["lost"].values()) for result in results),
        "sessions over long-poll": sum(
            transport == "longpoll" for result in results for _, _, transport in result.sessions
        ),
        "seconds": acks[-1][0] - began if acks else 0.0,
        "delay": spread(delays),
        "longest pause": longest,
        "pause before last frame": last,
        "CPU ms/s": median(result.cpu_ms_per_second for result in results),
        "PSS MB": median(result.pss_mb for result in results),
    }
    if restarted:
        stopped, ready = restarted
        figures["brain down"] = ready - stopped
        figures["back after"] = spread(
            sorted(max(0.0, each.back_after(stopped) - ready) for each in results)
        )
    return figures


def pauses(
    moments: Sequence[float], restarted: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Return the longest time between two acks, and the time before the last ack, in seconds.

    Acks at the same moment count as one. The first figure contains neither the pause before the
    last ack nor that of a restart.
    """
    gaps = [
        later - earlier
        for earlier, later in itertools.pairwise(moments)
        if restarted is None or later < restarted[0] or earlier > restarted[1]
    ]
    while gaps and gaps[-1] == 0:
        gaps.pop()
    return max(gaps[:-1], default=0.0), gaps[-1] if gaps else 0.0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90, p99 and the maximum of sorted values."""
    if not values:
        return {}
    last = len(values) - 1
    return {
        "p50": values[round(last * 0.5)],
        "p90": values[round(last * 0.9)],
        "p99": values[round(last * 0.99)],
        "max": values[last],
    }


def _compare(alone: Sequence[float], figures: dict[str, Any]) -> dict[str, Any]:
    """Compare the time of the fleet with the time of one agent for the same number of events."""
    rate = mean(alone)
    return {
        "events/s of one agent": list(alone),
        "time relative to one agent": figures["seconds"] * rate / figures["produced"],
    }


def _publish(
    args: argparse.Namespace,
    before: dict[str, Any],
    figures: dict[str, Any],
    results: Sequence[Result],
) -> None:
    print(table(("figure", "value"), [(key, _text(value)) for key, value in figures.items()]))
    options = {key: value for key, value in vars(args).items() if key != "name"}
    content = {**before, "options": options, "figures": figures}
    path = save("fleet", {**content, "hosts": [asdict(result) for result in results]})
    _draw(path.with_suffix(".png"), results)
    print(f"saved {path} and {path.with_suffix('.png').name}")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _draw(path: Path, results: Sequence[Result]) -> None:
    """Draw the intake of the brain, the agents with a session, and the delays of events."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6))
    acks = sorted(ack for result in results for ack in result.acks)
    began = min((at for result in results for at, *_ in result.sessions), default=0.0)
    _steps(panels[0], "events acknowledged", [(at - began, events) for at, events in acks])
    changes = sorted(
        (at - began, 1 if session else -1)
        for result in results
        for at, session, _ in result.sessions
    )
    _steps(panels[1], "agents with a session", changes)
    delays = sorted(delay for result in results for delay in result.delays)
    panels[2].plot(delays, [each / max(1, len(delays)) for each in range(len(delays))])
    panels[2].set_title("events acknowledged within a delay")
    for panel in panels:
        panel.set_xlabel("seconds")
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _steps(panel: Axes, title: str, changes: Sequence[tuple[float, int]]) -> None:
    moments = [at for at, _ in changes]
    panel.step(moments, list(itertools.accumulate(by for _, by in changes)), where="post")
    panel.set_title(title)
    panel.set_ylim(bottom=0)
