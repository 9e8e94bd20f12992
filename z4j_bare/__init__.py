"""The z4j agent runtime for task workers.

The agent runs in greenlets under gevent and eventlet, and in threads elsewhere. This package may be
imported before a process is monkey-patched, because it does not import ssl, asyncio, requests,
websocket, gevent or eventlet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare._process_singleton import post_fork
from z4j_bare.framework import BareFrameworkAdapter
from z4j_bare.install import install_agent
from z4j_bare.runtime import AgentRuntime, RuntimeState
from z4j_bare.safety import safe_boundary, safe_call

if TYPE_CHECKING:
    from z4j_bare.buffer.rows import BufferEntry
    from z4j_bare.buffer.store import BufferStore
    from z4j_bare.native_schedules import NativeScheduleControl

    __version__: str

__all__ = [
    "AgentRuntime",
    "BareFrameworkAdapter",
    "BufferEntry",
    "BufferStore",
    "NativeScheduleControl",
    "RuntimeState",
    "__version__",
    "install_agent",
    "post_fork",
    "safe_boundary",
    "safe_call",
]


def __getattr__(name: str) -> Any:
    # Loaded on access, because SQLite and the package metadata take time and few importers need
    # them.
    if name == "__version__":
        from importlib.metadata import version

        return version("z4j-bare")
    if name in ("BufferEntry", "BufferStore"):
        from z4j_bare.buffer import rows, store

        return getattr(rows if name == "BufferEntry" else store, name)
    if name == "NativeScheduleControl":
        from z4j_bare.native_schedules import NativeScheduleControl

        return NativeScheduleControl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
