"""Why does it not connect? Probes of this host, of the way to the brain and of the brain, each with its cause and its fix.

``z4j-bare doctor`` runs them, and so do the adapters' own doctors, by these names. None starts an agent or writes a
pidfile.
"""

from __future__ import annotations

from z4j_bare.diagnostics.agents import probe_agents
from z4j_bare.diagnostics.host import (
    probe_buffer_path,
    probe_concurrency,
    probe_package,
    probe_versions,
)
from z4j_bare.diagnostics.network import probe_dns, probe_tcp, probe_tls
from z4j_bare.diagnostics.plan import examine, glance, probe_websocket, run_all
from z4j_bare.diagnostics.result import ProbeResult

__all__ = [
    "ProbeResult",
    "examine",
    "glance",
    "probe_agents",
    "probe_buffer_path",
    "probe_concurrency",
    "probe_dns",
    "probe_package",
    "probe_tcp",
    "probe_tls",
    "probe_versions",
    "probe_websocket",
    "run_all",
]
