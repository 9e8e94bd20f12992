"""Code of users and adapters for type checkers: ``mypy --strict`` and pyright.

It is never run. Each line uses a public name with its types, so that a checker finds a signature
that has changed.
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
    """The minimal engine adapter."""

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
    """Use all public methods of a runtime."""
    assert_type(runtime.state, RuntimeState)
    assert_type(runtime.buffer_size(), int)
    runtime.record_event(an_event())
    runtime.request_reconnect()
    runtime.stop(timeout=2.5)
    acked, session = runtime.stats()["acked"], runtime.supervisor_state()["session_id"]
    return f"{acked} of {session} by {z4j_bare.__version__}"


def an_event() -> Event:
    """Create an event."""
    return Event(
        id=uuid4(),
        project_id=uuid4(),
        agent_id=uuid4(),
        engine="shop",
        task_id="1",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data={"task_name": "shop.pay"},
    )


@safe_boundary
def on_signal(sender: str, *, count: int = 1) -> int:
    """Suppress errors for the sender of the signal."""
    return count + len(sender)


def boundary() -> None:
    """Check that a boundary keeps the signature and adds ``None`` to the result."""
    assert_type(on_signal("x", count=2), int | None)
    assert_type(safe_call(len, "x"), int | None)


def adapt(config: Config) -> None:
    """Use the API as a framework adapter does."""
    framework = BareFrameworkAdapter(config)
    framework.on_startup(boundary)
    runtime = AgentRuntime(
        config=config, framework=framework, engines=[ShopEngine()], schedulers=[]
    )
    if try_register(runtime, owner="shop") is runtime and config.autostart:
        runtime.start()
        framework.fire_startup()
    register_shutdown_atexit(lambda: clear_runtime(expected=runtime))


def read_stats(store: BufferStore) -> int:
    """Use the classes that are exported for tools."""
    return store.stats().rows
