"""The agents that run here, as they tell it themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from z4j_bare import control
from z4j_bare.diagnostics.result import ProbeResult, passed, skipped, warned
from z4j_bare.monitoring.duplicate_agents import workers_of

Agent = dict[str, Any]


def probe_agents(project: str) -> ProbeResult:
    """Look whether all agents of this ``Z4J_HOME`` answer and are connected, and no worker is reported twice."""
    try:
        found = control.status()
    except OSError as error:
        return skipped("agents", f"Z4J_HOME cannot be looked into ({error.strerror})")
    ours = [agent for agent in found if "error" in agent or agent.get("project") == project]
    if not ours:
        return passed("agents", "none runs here")
    pids: Agent = {"pids": [agent["pid"] for agent in ours]}
    for complaint in (_silent, _doubled, _unconnected):
        said = complaint(ours)
        if said is not None:
            return warned("agents", *said, **pids)
    return passed("agents", f"{len(ours)} connected", **pids)


def doubled(agents: Sequence[Agent]) -> dict[str, list[int]]:
    """Return the workers that several agents report, with the pids of those."""
    reporters: dict[str, list[int]] = {}
    for agent in agents:
        for worker in workers_of(agent):
            reporters.setdefault(worker, []).append(agent["pid"])
    return {worker: pids for worker, pids in sorted(reporters.items()) if len(pids) > 1}


def _silent(agents: Sequence[Agent]) -> tuple[str, str] | None:
    silent = [agent for agent in agents if "error" in agent]
    if not silent:
        return None
    cause = "; ".join(
        f"process {agent['pid']} does not answer ({agent['error']})" for agent in silent
    )
    return cause, "see whether it is stopped, its hub blocked, or another user's"


def _doubled(agents: Sequence[Agent]) -> tuple[str, str] | None:
    twice = doubled(agents)
    if not twice:
        return None
    cause = "; ".join(
        f"{worker} is reported by processes {', '.join(map(str, pids))}"
        for worker, pids in twice.items()
    )
    return (
        cause,
        "each event arrives twice: stop the standalone agent, or take the agent out of the worker",
    )


def _unconnected(agents: Sequence[Agent]) -> tuple[str, str] | None:
    apart = [agent for agent in agents if not agent.get("connected")]
    if not apart:
        return None
    told = [
        f"process {agent['pid']} has no session ({agent.get('last_error') or 'not yet'})"
        for agent in apart
    ]
    return "; ".join(told), "it buffers and tries again; the lines below say what is in its way"
