"""``z4j-bare top``: agents, busiest tasks, running tasks and last failures on one screen."""

from __future__ import annotations

import argparse
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.cli.agents import ANSWER_TIMEOUT, no_agent_text, refresh_interval
from z4j_bare.cli.output import Output
from z4j_bare.cli.screen import END, Column, Line, Screen, share, table, table_width
from z4j_bare.cli.status import COLUMNS as STATUS_COLUMNS
from z4j_bare.cli.status import (
    agent_key,
    agent_title,
    exit_code,
    format_duration,
    query_agents,
    session_text,
    sparkline,
    with_rates,
)
from z4j_bare.cli.status import row as status_row
from z4j_bare.cli.tasks import IN_CHILD, rows_of
from z4j_bare.events.task_counts import TaskFailure
from z4j_bare.monitoring.duplicate_agents import workers_of

EXAMPLES = """\
examples:
  z4j-bare top                             refresh every 2 s
  z4j-bare top --worker celery@web-1       only one worker
  z4j-bare top --once                      print one sample, without a terminal
  z4j-bare top --json --once | jq .running

keys: s sort the busiest tasks by another column, / filter by a part of a name or worker,
  space freeze, q quit
exit codes: 0 every agent is connected, 1 an agent is not connected or no agent runs, 2 usage
"""

#: Seconds between two samples.
INTERVAL = 2.0

#: Seconds between the two samples of ``--once``, from which the rates are calculated.
ONCE_INTERVAL = 0.5

#: Maximum number of samples in a sparkline.
HISTORY_SIZE = 60

#: Maximum number of rows of a section if the output is not a terminal.
MAX_ROWS = 10

#: Maximum number of agents whose failed requests are shown.
MAX_NOTES = 3

#: Lines for the title, lines for the keys, and lines before the rows of each section.
_HEAD_LINES, _FOOT_LINES, _SECTION_LINES = 1, 1, 2

#: The keys that delete a character of the filter.
_DELETE = ("\x7f", "\b")

Row = dict[str, Any]
T = TypeVar("T")


class Busy(NamedTuple):
    """A task name with its counts in all selected agents.

    ``failed`` includes all exception classes. ``runtime`` is the mean of the successful runs, in
    seconds.
    """

    name: str
    running: int
    rate: float
    done: int
    failed: int
    retried: int
    runtime: float | None


#: Maps each column by which the busiest tasks can be sorted to its sort key.
SORTS: dict[str, Callable[[Busy], Any]] = {
    "rate": lambda busy: (-busy.rate, -busy.running, -busy.done),
    "failed": lambda busy: -busy.failed,
    "runtime": lambda busy: -(busy.runtime or 0.0),
    "running": lambda busy: -busy.running,
    "name": lambda busy: busy.name,
}

_AGENT_COLUMNS = (
    Column("agent", flexible=1),
    Column("pid", right=True),
    Column("mode"),
    Column("session", flexible=1),
    Column("events/s", right=True),
    Column("buffered", right=True),
    Column("lost", right=True),
    Column("lag p99", right=True),
)

_BUSY_COLUMNS = (
    Column("busiest tasks", flexible=1, keep_end=True),
    Column("running", right=True),
    Column("ends/s", right=True),
    Column("done", right=True),
    Column("failed", right=True),
    Column("retried", right=True),
    Column("mean run", right=True),
)

_RUNNING_COLUMNS = (
    Column("age", right=True),
    Column("longest runs", flexible=3, keep_end=True),
    Column("position", flexible=1),
    Column("waiting in", flexible=2),
)

_FAILURE_COLUMNS = (
    Column("age", right=True),
    Column("last failures", flexible=2, keep_end=True),
    Column("exception", flexible=1),
    Column("worker", flexible=2),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``top``."""
    parser.add_argument("--worker", metavar="NAME", help="only the agent of this worker")
    parser.add_argument(
        "--interval",
        type=refresh_interval,
        default=INTERVAL,
        metavar="SECONDS",
        help="seconds between two samples (default: 2)",
    )
    parser.add_argument("--once", action="store_true", help="print one sample and exit")
    configuration.add_agents(parser)


def run(arguments: argparse.Namespace) -> int:
    """Refresh until the operator quits; return the exit code of the last sample."""
    configuration.open_home(arguments)
    output, top = Output(json_only=arguments.json), Top(arguments)
    if not arguments.once:
        return watch(output, top, arguments.interval)
    top.poll()
    time.sleep(ONCE_INTERVAL if top.agents else 0)
    top.poll()
    if not arguments.json:
        for line in top.lines(*_plain_size()):
            output.print_line(line.text.rstrip())
    output.print_json(top.document())
    return top.exit_code()


def watch_status(output: Output, arguments: argparse.Namespace) -> int:
    """Refresh the table of ``status`` and the last samples of each agent until interrupted."""
    return watch(output, StatusHistory(arguments), arguments.watch)


def watch(output: Output, view: StatusHistory, interval: float) -> int:
    """Poll and draw ``view`` until the operator quits; return the exit code of the last sample."""
    screen = Screen()
    try:
        with screen.opened():
            while True:
                if not view.frozen:
                    view.poll()
                if output.json_only:
                    output.print_json(view.document())
                else:
                    screen.draw(view.lines(*screen.size()))
                if not _wait(screen, view, time.monotonic() + interval):
                    break
    except KeyboardInterrupt:
        pass
    return view.exit_code()


def _wait(screen: Screen, view: StatusHistory, until: float) -> bool:
    """Handle the keys until the next sample; return ``False`` if the operator quits."""
    left = until - time.monotonic()
    while True:
        key = screen.wait(left)
        if not key:
            return True
        if not view.press(key):
            return False
        screen.draw(view.lines(*screen.size()))
        left = until - time.monotonic()


class StatusHistory:
    """The agents, and the last samples of their rates and buffers, for ``status --watch``."""

    #: The keys, for the last line of the screen.
    keys = "space freeze  q quit"

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.agents: list[Row] = []
        self.frozen = False
        self._arguments = arguments
        self._rates: dict[tuple[str, int], deque[float]] = {}
        self._depths: dict[tuple[str, int], deque[float]] = {}
        self._polled_at = time.monotonic()
        self._sampled = time.time()

    def poll(self) -> None:
        """Read the state of the agents."""
        agents, now = query_agents(self._arguments), time.monotonic()
        self.agents = with_rates(self.agents, agents, max(now - self._polled_at, 0.001))
        self._polled_at, self._sampled = now, time.time()
        for agent in agents:
            for histories, key in ((self._rates, "events_per_second"), (self._depths, "buffered")):
                history = histories.setdefault(agent_key(agent), deque(maxlen=HISTORY_SIZE))
                history.append(agent.get(key, 0))

    def press(self, key: str) -> bool:
        """Handle a key; return ``False`` if the operator quits."""
        if key == " ":
            self.frozen = not self.frozen
        return key not in ("q", "Q", END)

    def exit_code(self) -> int:
        """Return the exit code of ``status``."""
        return exit_code(self.agents)

    def document(self) -> Row:
        """Return the last sample as JSON types."""
        return {"ok": self.exit_code() == 0, "agents": self.agents}

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the screen.

        :param height: number of lines of the terminal; 0 if there is no terminal.
        """
        rows = [status_row(agent) for agent in self.agents]
        columns = [Column(title, flexible=int(title == "last error")) for title in STATUS_COLUMNS]
        texts = table(columns, rows, width) if rows else [no_agent_text(self._arguments)]
        lines = [Line(text) for text in texts]
        for agent in self.agents:
            rates, depths = self._rates[agent_key(agent)], self._depths[agent_key(agent)]
            lines += [
                Line(f"{agent_title(agent)} [{agent['pid']}]"),
                Line(f"  events/s  {sparkline(rates)}  max {max(rates):g}"),
                Line(f"  buffered  {sparkline(depths)}  max {max(depths):g}"),
            ]
        if height:
            frozen = "frozen  " if self.frozen else ""
            lines = [*lines[: height - 1], Line(frozen + self.keys, "dim")]
        return lines


class Top(StatusHistory):
    """The agents, their tasks and their failures, for ``top``."""

    keys = "s sort  / filter  space freeze  q quit"

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self._sort = next(iter(SORTS))
        self._filter = ""
        self._editing = False
        self._counts: dict[tuple[str, int], Row] = {}
        self._lags: dict[tuple[str, int], float] = {}
        self._ends: Counter[tuple[tuple[str, int], str]] = Counter()
        self._busy: list[Busy] = []
        self._running: list[Row] = []
        self._refusals: dict[tuple[str, int], str] = {}

    def poll(self) -> None:
        """Read the state, the counts and the running tasks of the agents."""
        before = self._polled_at
        super().poll()
        seconds = max(self._polled_at - before, 0.001)
        self._refusals = {}
        selected = {agent_key(agent) for agent in self.agents if "error" not in agent}
        known, self._counts = set(self._counts), self._query(control.METRICS, selected)
        self._lags = {
            key: answer["lag"]["recent"]["p99_seconds"]
            for key, answer in self._query(control.HUB, selected).items()
        }
        self._running = sorted(
            (
                task
                for answer in self._query(control.TASKS, selected).values()
                for task in answer.get("tasks", ())
            ),
            key=lambda task: -task["age_seconds"],
        )
        self._busy = self._count(known, seconds)

    def press(self, key: str) -> bool:
        """Handle a key; return ``False`` if the operator quits."""
        if self._editing and key != END:
            self._edit(key)
            return True
        if key in ("s", "S"):
            names = list(SORTS)
            self._sort = names[(names.index(self._sort) + 1) % len(names)]
        elif key == "/":
            self._editing, self._filter = True, ""
        elif key == "\x1b":
            self._filter = ""
        return super().press(key)

    def document(self) -> Row:
        """Return the last sample as JSON types."""
        return {
            **super().document(),
            "home": str(configuration.home()),
            "busiest": [busy._asdict() for busy in self._busy],
            "running": self._running,
            "failures": [failure._asdict() for failure in self._failures()],
            "refused": [
                {"adapter": adapter, "pid": pid, "error": error}
                for (adapter, pid), error in self._refusals.items()
            ],
        }

    def lines(self, width: int, height: int) -> list[Line]:
        """Return the screen.

        :param height: number of lines of the terminal; 0 if there is no terminal.
        """
        if not self.agents:
            return [Line(no_agent_text(self._arguments))]
        agents = self._matching(self.agents, lambda agent: (agent_title(agent), *workers_of(agent)))
        busy = self._matching(sorted(self._busy, key=SORTS[self._sort]), lambda each: (each.name,))
        running = self._matching(self._running, lambda task: (task["name"], task["worker"] or ""))
        failures = self._matching(self._failures(), lambda each: (each.name, each.worker))
        sections = [
            (_AGENT_COLUMNS, [self._agent_row(agent) for agent in agents]),
            (_BUSY_COLUMNS, [_busy_row(each) for each in busy]),
            (_RUNNING_COLUMNS, running_rows(running, width)),
            (_FAILURE_COLUMNS, [_failure_row(each, self._sampled) for each in failures]),
        ]
        notes = [
            Line(f"no tasks and no counts of process {pid}: {error}", "bold red")
            for (_, pid), error in self._refusals.items()
        ][:MAX_NOTES]
        left = height - _HEAD_LINES - _FOOT_LINES - _SECTION_LINES * len(sections) - len(notes)
        wanted = [len(rows) for _, rows in sections]
        shown = share(max(left, len(sections)), wanted) if height else [MAX_ROWS] * len(sections)
        lines = [Line(self._title(), "bold"), *notes]
        for (columns, rows), number in zip(sections, shown, strict=True):
            head, *texts = table(columns, rows[:number], width)
            more = f"  (+{len(rows) - number})" if len(rows) > number else ""
            head = head.rstrip()[: width - len(more)] + more
            lines += [Line(""), Line(head.ljust(width), "reverse")]
            lines += map(Line, texts)
        if height:
            lines = [*lines[: height - 1], Line(self._footer(), "dim")]
        return lines

    def _title(self) -> str:
        rate = sum(agent.get("events_per_second", 0) for agent in self.agents)
        buffered = sum(agent.get("buffered", 0) for agent in self.agents)
        clock = time.strftime("%H:%M:%S", time.localtime(self._sampled))
        return (
            f"z4j-bare top  {clock}  agents {len(self.agents)}  events/s {rate:g}"
            f"  buffered {buffered}  running {len(self._running)}"
        )

    def _footer(self) -> str:
        if self._editing:
            return f"filter: {self._filter}_  (Enter: apply, Esc: no filter)"
        parts = ["frozen"] if self.frozen else []
        parts += [f"filter: {self._filter}"] if self._filter else []
        return "  ".join([*parts, f"sorted by {self._sort}", self.keys])

    def _edit(self, key: str) -> None:
        if key in ("\r", "\n", "\x1b"):
            self._editing = False
            self._filter = "" if key == "\x1b" else self._filter
        elif key in _DELETE:
            self._filter = self._filter[:-1]
        elif key.isprintable():
            self._filter += key

    def _matching(self, rows: Iterable[T], texts: Callable[[T], Iterable[str]]) -> list[T]:
        wanted = self._filter.lower()
        return [row for row in rows if any(wanted in text.lower() for text in texts(row))]

    def _query(self, verb: str, selected: set[tuple[str, int]]) -> dict[tuple[str, int], Row]:
        """Return the selected agents' answers; keep the errors of failed requests."""
        answers = {
            agent_key(answer): answer
            for answer in control.query(verb, None, ANSWER_TIMEOUT)
            if agent_key(answer) in selected
        }
        refused = {key: answer["error"] for key, answer in answers.items() if "error" in answer}
        self._refusals |= refused
        return {key: answer for key, answer in answers.items() if key not in refused}

    def _count(self, known: set[tuple[str, int]], seconds: float) -> list[Busy]:
        """Return the counts by task name, with the rates since the previous sample.

        :param known: the agents in the previous sample. The rates omit the ends of other agents.
        """
        running = Counter(task["name"] for task in self._running)
        tasks: dict[str, list[Row]] = {name: [] for name in running}
        ends: Counter[tuple[tuple[str, int], str]] = Counter()
        growth: Counter[str] = Counter()
        for key, answer in self._counts.items():
            for task in answer["tasks"]:
                tasks.setdefault(task["name"], []).append(task)
                ends[key, task["name"]] += _ends(task)
        for (key, name), number in ends.items():
            growth[name] += number - self._ends[key, name] if key in known else 0
        self._ends = ends
        return [
            _busy(name, running[name], growth[name] / seconds, rows) for name, rows in tasks.items()
        ]

    def _failures(self) -> list[TaskFailure]:
        """Return the last failures of all agents, latest first."""
        failures = [
            TaskFailure(**failure)
            for answer in self._counts.values()
            for failure in answer.get("failures", ())
        ]
        return sorted(failures, reverse=True)

    def _agent_row(self, agent: Row) -> list[str]:
        title, pid = agent_title(agent), str(agent["pid"])
        if "error" in agent:
            return [title, pid, "", "no answer", "", "", "", ""]
        lag = self._lags.get(agent_key(agent))
        session = session_text(agent)
        if not agent["connected"] and agent["last_error"]:
            session += f": {agent['last_error']}"
        return [
            title,
            pid,
            agent["concurrency"],
            session,
            f"{agent.get('events_per_second', 0):g}",
            str(agent["buffered"] + agent["adopting"]),
            str(sum(agent["lost"].values())),
            "" if lag is None else _seconds(lag),
        ]


def _busy(name: str, running: int, rate: float, tasks: Sequence[Row]) -> Busy:
    succeeded = sum(task["succeeded"] for task in tasks)
    seconds = sum(task["runtime_seconds"] for task in tasks)
    return Busy(
        name,
        running,
        round(rate, 1),
        succeeded,
        sum(sum(task["failed"].values()) for task in tasks),
        sum(task["retried"] for task in tasks),
        seconds / succeeded if succeeded else None,
    )


def _ends(task: Row) -> int:
    return sum((task["succeeded"], *task["failed"].values(), task["retried"], task["revoked"]))


def _busy_row(busy: Busy) -> list[str]:
    runtime = "" if busy.runtime is None else _seconds(busy.runtime)
    counts = (busy.done, busy.failed, busy.retried)
    return [busy.name, str(busy.running), f"{busy.rate:g}", *map(str, counts), runtime]


def running_rows(tasks: Sequence[Row], width: int) -> list[list[str]]:
    """Return a row for each running task.

    While the rows are wider than ``width``, they omit the innermost function of the wait, then the
    directories of the position, then the class of the position. File, line and function remain.
    """
    rows = [_running_row(task) for task in tasks]
    for shorter in (_without_inner_wait, _without_directories, _without_class):
        if table_width(_RUNNING_COLUMNS, rows) <= width:
            break
        rows = [[age, name, *shorter(position, waiting)] for age, name, position, waiting in rows]
    return rows


def _running_row(task: Row) -> list[str]:
    age, name, _, _, pid, position, waiting_in = rows_of(task)[0]
    return [
        age,
        name,
        f"(in child process {pid})" if position == IN_CHILD else position,
        waiting_in,
    ]


def _without_inner_wait(position: str, waiting: str) -> tuple[str, str]:
    return position, waiting.partition(" (")[0]


def _without_directories(position: str, waiting: str) -> tuple[str, str]:
    path, separator, function = position.partition(" in ")
    return (path.rpartition("/")[2] if function else path) + separator + function, waiting


def _without_class(position: str, waiting: str) -> tuple[str, str]:
    path, separator, function = position.partition(" in ")
    return path + separator + function.rpartition(".")[2], waiting


def _failure_row(failure: TaskFailure, now: float) -> list[str]:
    age = format_duration(max(0.0, now - failure.at))
    return [age, failure.name, failure.exception, failure.worker]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _plain_size() -> tuple[int, int]:
    return Screen().size()[0], 0
