"""What users and adapters write against this package, for type checkers to read: mypy --strict and pyright.

Never run. Each line uses something public with its types told, so that a signature that changes is noticed here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import assert_type
from uuid import uuid4

from z4j_core.models import Config, Event, EventKind

import z4j_bare
from z4j_bare import (
    AgentRuntime,
    BareFrameworkAdapter,
    BufferStore,
    RuntimeState,
    install_agent,
    safe_boundary,
    safe_call,
)
from z4j_bare._process_singleton import clear_runtime, try_register
from z4j_bare.control import register_shutdown_atexit


class ShopEngine:
    """The least that an engine is."""

    name = "shop"

    def capabilities(self) -> set[str]:
        return {"submit_task"}


def install() -> AgentRuntime:
    """Start the agent, as an application does."""
    runtime = install_agent(
        engines=[ShopEngine()],
        brain_url="https://brain.example.com",
        project_id="shop",
        token_file=Path("/run/secrets/token"),
        hmac_secret_file=Path("/run/secrets/key"),
        tags={"zone": "b"},
        concurrency="gevent",
    )
    return assert_type(runtime, AgentRuntime)


def use(runtime: AgentRuntime) -> str:
    """Ask a runtime everything that it answers."""
    assert_type(runtime.state, RuntimeState)
    assert_type(runtime.buffer_size(), int)
    runtime.record_event(an_event())
    runtime.request_reconnect()
    runtime.stop(timeout=2.5)
    return f"{runtime.stats()['acked']} of {runtime.supervisor_state()['session_id']} by {z4j_bare.__version__}"


def an_event() -> Event:
    """Make an event of one's own."""
    return Event(
        id=uuid4(), project_id=uuid4(), agent_id=uuid4(), engine="shop", task_id="1",
        kind=EventKind.TASK_SUCCEEDED, occurred_at=datetime.now(UTC), data={"task_name": "shop.pay"},
    )  # fmt: skip


@safe_boundary
def on_signal(sender: str, *, count: int = 1) -> int:
    """Keep what fails here from whoever sends the signal."""
    return count + len(sender)


def boundary() -> None:
    """See that a boundary keeps the signature and adds ``None`` to the result."""
    assert_type(on_signal("x", count=2), int | None)
    assert_type(safe_call(len, "x"), int | None)


def adapt(config: Config) -> None:
    """Do what framework adapters do."""
    framework = BareFrameworkAdapter(config)
    framework.on_startup(boundary)
    runtime = AgentRuntime(
        config=config, framework=framework, engines=[ShopEngine()], schedulers=[]
    )
    if try_register(runtime, owner="shop") is runtime and config.autostart:
        runtime.start()
        framework.fire_startup()
    register_shutdown_atexit(lambda: clear_runtime(expected=runtime))


def look(store: BufferStore) -> int:
    """Use what is exported for tools."""
    return store.stats().rows
