"""Probe of the agents that run on this host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from z4j_bare import control
from z4j_bare.diagnostics.result import ProbeResult, passed, skipped, warned
from z4j_bare.monitoring.duplicate_agents import workers_of

#: An agent's answer to ``status``, with ``adapter`` and ``pid``, or these two and an ``error``.
AgentStatus = dict[str, Any]


def probe_agents(project: str) -> ProbeResult:
    """Check that every agent of this ``Z4J_HOME`` answers and is connected.

    It also checks that no two agents report the same worker.

    :param project: agents of other projects are ignored.
    """
    try:
        found = control.status()
    except OSError as error:
        return skipped("agents", f"cannot read Z4J_HOME ({error.strerror})")
    agents = [agent for agent in found if "error" in agent or agent.get("project") == project]
    if not agents:
        return passed("agents", "no agent is running")
    pids: dict[str, Any] = {"pids": [agent["pid"] for agent in agents]}
    for check in (_check_answers, _check_duplicates, _check_connections):
        problem = check(agents)
        if problem is not None:
            return warned("agents", *problem, **pids)
    return passed("agents", f"{len(agents)} connected", **pids)


def duplicated_workers(agents: Sequence[AgentStatus]) -> dict[str, list[int]]:
    """Return the workers that several agents report, with the pids of these agents."""
    reporters: dict[str, list[int]] = {}
    for agent in agents:
        for worker in workers_of(agent):
            reporters.setdefault(worker, []).append(agent["pid"])
    return {worker: pids for worker, pids in sorted(reporters.items()) if len(pids) > 1}


def _check_answers(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if an agent does not answer."""
    silent = [agent for agent in agents if "error" in agent]
    if not silent:
        return None
    cause = "; ".join(
        f"process {agent['pid']} does not answer ({agent['error']})" for agent in silent
    )
    return cause, (
        "check whether the process is stopped, its event loop is blocked, or another user owns it"
    )


def _check_duplicates(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if several agents report one worker."""
    duplicates = duplicated_workers(agents)
    if not duplicates:
        return None
    cause = "; ".join(
        f"{worker} is reported by processes {', '.join(map(str, pids))}"
        for worker, pids in duplicates.items()
    )
    return cause, (
        "each event arrives twice: stop the standalone agent, or remove the agent from the worker"
    )


def _check_connections(agents: Sequence[AgentStatus]) -> tuple[str, str] | None:
    """Return cause and fix if an agent has no session."""
    unconnected = [agent for agent in agents if not agent.get("connected")]
    if not unconnected:
        return None
    cause = "; ".join(
        f"process {agent['pid']} has no session ({agent.get('last_error') or 'connecting'})"
        for agent in unconnected
    )
    return cause, "it buffers events and retries; the probes below show why it cannot connect"
