"""``z4j-bare status``: how the agents of this host are, as they tell it themselves."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.cli.output import Output
from z4j_bare.monitoring.duplicate_agents import workers_of

EXAMPLES = """\
examples:
  z4j-bare status                    every agent of this Z4J_HOME
  z4j-bare status --watch            live, with what happened in the last minute
  z4j-bare status --quiet            a probe: say nothing, exit 1 unless all are connected
  z4j-bare status --worker celery@web-1 --json

exit codes: 0 every agent is connected, 1 one is not or there is none, 2 usage
"""

#: Seconds between the two looks that make a rate.
SAMPLE = 0.5

#: Looks that a sparkline shows.
HISTORY = 60

COLUMNS = (
    "agent",
    "pid",
    "mode",
    "session",
    "buffered",
    "oldest",
    "events/s",
    "sent",
    "last error",
)

_BARS = "▁▂▃▄▅▆▇█"

Agent = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where to look, for whom, and how often."""
    configuration.add_agents(parser)
    parser.add_argument("--worker", metavar="NAME", help="only agents that report this worker")
    often = "look again and again (default: every second)"
    parser.add_argument(
        "--watch", nargs="?", type=_interval, const=1.0, metavar="SECONDS", help=often
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="say nothing, for probes")


def run(arguments: argparse.Namespace) -> int:
    """Ask, show, and return 0 if every agent is connected."""
    configuration.open_home(arguments)
    if arguments.quiet:
        return exit_code(ask(arguments))
    output = Output(machine=arguments.json)
    if arguments.watch:
        return Watch(output, arguments).run()
    first = ask(arguments)
    time.sleep(SAMPLE if first else 0)
    agents = rated(first, ask(arguments), SAMPLE)
    output.answer(
        {"ok": exit_code(agents) == 0, "home": str(configuration.home()), "agents": agents}
    )
    show(output, agents, whose(arguments))
    return exit_code(agents)


def ask(arguments: argparse.Namespace) -> list[Agent]:
    """Return what the agents in question say; one that does not answer has an ``error`` instead."""
    return [
        agent
        for agent in control.status()
        if arguments.adapter in (None, agent["adapter"]) and _reports(agent, arguments.worker)
    ]


def exit_code(agents: Sequence[Agent]) -> int:
    """Return 0 if there is an agent, and every one of them is connected."""
    return 0 if agents and all(agent.get("connected") for agent in agents) else 1


def rated(before: Sequence[Agent], now: Sequence[Agent], seconds: float) -> list[Agent]:
    """Return the agents as they are now, with ``events_per_second`` since the look before."""
    earlier = {_key(agent): agent.get("produced", 0) for agent in before}
    for agent in now:
        if "produced" in agent:
            produced = agent["produced"] - earlier.get(_key(agent), agent["produced"])
            agent["events_per_second"] = round(produced / seconds, 1)
    return list(now)


def whose(arguments: argparse.Namespace) -> str:
    """Return which agents were asked for, as it stands after the word "agent"; all is nothing."""
    adapter = f" of {arguments.adapter}" if arguments.adapter else ""
    return adapter + (f" that reports {arguments.worker}" if arguments.worker else "")


def show(output: Output, agents: Sequence[Agent], wanted: str) -> None:
    """Write the table, or where none of the ``wanted`` was found and what that may mean."""
    if not agents:
        hint = "Z4J_HOME of the workers, and their user?"
        output.say(f"no agent{wanted} runs here: looked in {configuration.home()} ({hint})")
        return
    output.table(COLUMNS, [row(agent) for agent in agents])


def row(agent: Agent) -> list[str]:
    """Return the cells of one agent."""
    name, pid = _title(agent), str(agent["pid"])
    if "error" in agent:
        hint = "is its process stopped, or its hub blocked?"
        return [name, pid, "", "no answer", "", "", "", "", f"{agent['error']}: {hint}"]
    age = agent["oldest_age_seconds"]
    return [
        name,
        pid,
        agent["concurrency"],
        _session(agent),
        str(agent["buffered"] + agent["adopting"]),
        "" if age is None or not agent["buffered"] else span(age),
        f"{agent.get('events_per_second', 0):g}",
        str(agent["acked"]),
        agent["last_error"],
    ]


def span(seconds: float) -> str:
    """Return a time in the unit that fits it: ``12 s``, ``3 min``, ``5 h``, ``2 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def sparkline(values: Sequence[float]) -> str:
    """Return the values as bars, the largest being the highest."""
    top = max(values, default=0)
    if top <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)


class Watch:
    """Looks again and again, and remembers what it saw."""

    def __init__(self, output: Output, arguments: argparse.Namespace) -> None:
        self._output = output
        self._arguments = arguments
        self._rates: dict[Any, deque[float]] = {}
        self._depths: dict[Any, deque[float]] = {}
        self._last: list[Agent] = []
        self._looked_at = time.monotonic()

    def run(self) -> int:
        """Go on until interrupted; return the exit code of the last look."""
        try:
            with self._output.live() as update:
                while True:
                    self._look()
                    update(self._draw)
                    self._output.answer({"ok": exit_code(self._last) == 0, "agents": self._last})
                    time.sleep(self._arguments.watch)
        except KeyboardInterrupt:
            return exit_code(self._last)

    def _look(self) -> None:
        agents, now = ask(self._arguments), time.monotonic()
        self._last = rated(self._last, agents, max(now - self._looked_at, 0.001))
        self._looked_at = now
        for agent in agents:
            for history, figure in ((self._rates, "events_per_second"), (self._depths, "buffered")):
                history.setdefault(_key(agent), deque(maxlen=HISTORY)).append(agent.get(figure, 0))

    def _draw(self) -> None:
        show(self._output, self._last, whose(self._arguments))
        for agent in self._last:
            rates, depths = self._rates[_key(agent)], self._depths[_key(agent)]
            self._output.say(f"{_title(agent)} [{agent['pid']}]")
            self._output.say(f"  events/s  {sparkline(rates)}  at most {max(rates):g}")
            self._output.say(f"  buffered  {sparkline(depths)}  at most {max(depths):g}")


def _interval(text: str) -> float:
    wrong = argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, at most 3600")
    try:
        seconds = float(text)
    except ValueError:
        raise wrong from None
    if not 0 < seconds <= 3600:  # noqa: PLR2004 - an hour; also refuses NaN
        raise wrong
    return seconds


def _key(agent: Agent) -> tuple[str, int]:
    return agent["adapter"], agent["pid"]


def _reports(agent: Agent, worker: str | None) -> bool:
    return worker is None or worker in workers_of(agent)


def _title(agent: Agent) -> str:
    names = sorted(workers_of(agent))
    if len(names) == 1:
        return str(names[0])
    return agent.get("agent_name") or (
        f"{agent['adapter']} ({len(names)} workers)" if names else agent["adapter"]
    )


def _session(agent: Agent) -> str:
    if not agent["connected"]:
        return "not connected"
    since = agent.get("connected_at")
    age = "" if since is None else f" for {span(datetime.now(UTC).timestamp() - since)}"
    return f"{agent['transport']}{age}"
