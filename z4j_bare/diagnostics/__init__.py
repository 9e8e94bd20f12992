"""Probes of the host, the network and the brain that find out why an agent does not connect.

The result of a failed probe names the cause and the fix. ``z4j-bare doctor`` runs all probes.
Adapter packages import the names in ``__all__``. A probe starts no agent and writes no pid file.
"""

from __future__ import annotations

from z4j_bare.diagnostics.checks import all_checks, probe_websocket, quick_checks, run_all
from z4j_bare.diagnostics.host import (
    probe_agents,
    probe_buffer_path,
    probe_concurrency,
    probe_package,
    probe_versions,
)
from z4j_bare.diagnostics.network import probe_dns, probe_tcp, probe_tls
from z4j_bare.diagnostics.result import ProbeResult

__all__ = [
    "ProbeResult",
    "all_checks",
    "probe_agents",
    "probe_buffer_path",
    "probe_concurrency",
    "probe_dns",
    "probe_package",
    "probe_tcp",
    "probe_tls",
    "probe_versions",
    "probe_websocket",
    "quick_checks",
    "run_all",
]
