"""``z4j-bare status`` and ``z4j-bare restart``: query and reconnect the agents on this host."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.cli.agents import add_watch, no_agent_text
from z4j_bare.cli.output import Output
from z4j_bare.diagnostics.host import AgentStatus, broker_problem
from z4j_bare.monitoring.duplicate_agents import workers_of

EXAMPLES = """\
examples:
  z4j-bare status                    every agent of this Z4J_HOME
  z4j-bare status --watch            refresh every second, with the last 60 samples as bars
  z4j-bare status --quiet            for health probes: no output, only the exit code
  z4j-bare status --worker celery@web-1 --json

exit codes: 0 every agent is connected, 1 an agent is not connected or no agent runs,
  2 usage
"""

RESTART_EXAMPLES = """\
examples:
  z4j-bare restart                       every agent of this Z4J_HOME
  z4j-bare restart --adapter django      only agents of one framework adapter

The workers keep running. Each agent closes its session, reads the token and key files again and
reconnects. No event is lost: unacknowledged rows stay in the buffer and are sent again.
exit codes: 0 every agent accepted the request, 1 no agent runs or an agent did not answer,
  2 usage, or the platform has no Unix sockets
"""

#: Seconds between the two samples from which a rate is calculated.
SAMPLE_INTERVAL = 0.5

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``status``."""
    configuration.add_agents(parser)
    parser.add_argument("--worker", metavar="NAME", help="only agents that report this worker")
    add_watch(parser)
    parser.add_argument(
        "--quiet", "-q", action="store_true", help="print nothing, for health probes"
    )


def add_restart_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``restart``."""
    configuration.add_agents(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the state of the selected agents; return the exit code (see :func:`exit_code`)."""
    configuration.open_home(arguments)
    if arguments.quiet:
        return exit_code(query_agents(arguments))
    output = Output(json_only=arguments.json)
    if arguments.watch:
        from z4j_bare.cli import top

        return top.watch_status(output, arguments)
    first = query_agents(arguments)
    time.sleep(SAMPLE_INTERVAL if first else 0)
    agents = with_rates(first, query_agents(arguments), SAMPLE_INTERVAL)
    output.print_json(
        {"ok": exit_code(agents) == 0, "home": str(configuration.home()), "agents": agents}
    )
    print_agents(output, agents, arguments)
    return exit_code(agents)


def run_restart(arguments: argparse.Namespace) -> int:
    """Make the selected agents reconnect; return the highest exit code of their adapters."""
    configuration.open_home(arguments)
    output = Output(json_only=arguments.json)
    adapters = [arguments.adapter] if arguments.adapter else _running_adapters() or ["bare"]
    results = {adapter: control.send_restart(adapter) for adapter in adapters}
    for code, text in results.values():
        output.print_line(text, "bold red" if code else "")
    highest = max(code for code, _ in results.values())
    texts = {adapter: text for adapter, (_, text) in results.items()}
    output.print_json({"ok": highest == 0, "adapters": texts})
    return highest


def query_agents(arguments: argparse.Namespace) -> list[AgentStatus]:
    """Return the status of the selected agents.

    The status of an agent that does not answer contains ``error``.
    """
    return [
        agent
        for agent in control.status()
        if arguments.adapter in (None, agent["adapter"])
        and _reports_worker(agent, arguments.worker)
    ]


def exit_code(agents: Sequence[AgentStatus]) -> int:
    """Return 0 if there is at least one agent and every agent is connected, else 1."""
    return 0 if agents and all(agent.get("connected") for agent in agents) else 1


def with_rates(
    before: Sequence[AgentStatus], now: Sequence[AgentStatus], seconds: float
) -> list[AgentStatus]:
    """Return the agents of ``now`` with ``events_per_second`` added to each agent that answered.

    :param before: the previous sample.
    :param now: the current sample.
    :param seconds: time between the two samples.
    """
    earlier = {agent_key(agent): agent.get("produced", 0) for agent in before}
    for agent in now:
        if "produced" in agent:
            produced = agent["produced"] - earlier.get(agent_key(agent), agent["produced"])
            agent["events_per_second"] = round(produced / seconds, 1)
    return list(now)


def print_agents(
    output: Output, agents: Sequence[AgentStatus], arguments: argparse.Namespace
) -> None:
    """Write a table of the agents; if there is no agent, write what to do."""
    if not agents:
        output.print_line(no_agent_text(arguments))
        return
    output.print_table(COLUMNS, [row(agent) for agent in agents])


def row(agent: AgentStatus) -> list[str]:
    """Return the table cells of one agent, one for each of :data:`COLUMNS`."""
    name, pid = agent_title(agent), str(agent["pid"])
    if "error" in agent:
        hint = "check whether its process is stopped or its event loop blocked"
        return [name, pid, "", "no answer", "", "", "", "", f"{agent['error']}: {hint}"]
    age = agent["oldest_age_seconds"]
    return [
        name,
        pid,
        agent["concurrency"],
        session_text(agent),
        str(agent["buffered"] + agent["adopting"]),
        "" if age is None or not agent["buffered"] else format_duration(age),
        f"{agent.get('events_per_second', 0):g}",
        str(agent["acked"]),
        agent["last_error"] or broker_problem(agent),
    ]


def format_duration(seconds: float) -> str:
    """Return a duration in its largest unit: ``12 s``, ``3 min``, ``5 h`` or ``2 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def sparkline(values: Sequence[float]) -> str:
    """Return a bar for each value. The largest value has the highest bar."""
    top = max(values, default=0)
    if top <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)


def _running_adapters() -> list[str]:
    return sorted({client.adapter for client in control.list_clients()})


def agent_key(agent: AgentStatus) -> tuple[str, int]:
    """Return adapter and pid, which identify an agent of this host."""
    return agent["adapter"], agent["pid"]


def _reports_worker(agent: AgentStatus, worker: str | None) -> bool:
    return worker is None or worker in workers_of(agent)


def agent_title(agent: AgentStatus) -> str:
    """Return the name under which an agent is listed: its worker, if it reports only one."""
    names = sorted(workers_of(agent))
    if len(names) == 1:
        return str(names[0])
    return agent.get("agent_name") or (
        f"{agent['adapter']} ({len(names)} workers)" if names else agent["adapter"]
    )


def session_text(agent: AgentStatus) -> str:
    """Return the transport and age of the session, or a text if there is no session."""
    if not agent["connected"]:
        return "turned away" if agent.get("turned_away") else "not connected"
    since = agent.get("connected_at")
    age = "" if since is None else f" for {format_duration(datetime.now(UTC).timestamp() - since)}"
    return f"{agent['transport']}{age}"
