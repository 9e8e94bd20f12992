"""What ``z4j_core``'s ``Config`` has no field for (it is frozen and forbids extras).

Each setting comes from a keyword of ``install_agent``, else from its ``Z4J_*`` variable, else from its default. Adapters
that build ``AgentRuntime(config=...)`` themselves reach these through the environment.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from z4j_bare.errors import HostConfigurationError

N = TypeVar("N", int, float)

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


def _switch(name: str, text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise HostConfigurationError(
        f"{name}={text!r} is neither on (1, true, yes, on) nor off (0, false, no, off)"
    )


def _on(_name: str, text: str) -> bool:
    """Read a switch as the adapters do, for a variable of theirs: anything else is off."""
    return text.lower() in _TRUE


def _seconds(name: str, text: str) -> float:
    return _number(name, text, float)


def _count(name: str, text: str) -> int:
    return _number(name, text, int)


def _number(name: str, text: str, kind: Callable[[str], N]) -> N:
    try:
        number = kind(text)
    except ValueError:
        raise HostConfigurationError(f"{name}={text!r} is not a number") from None
    if not math.isfinite(number):
        raise HostConfigurationError(f"{name}={text!r} is not a finite number")
    return number


def _existing_file(name: str, text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise HostConfigurationError(f"{name}={text!r}: no such file")
    return path


def _text(_name: str, text: str) -> str:
    return text


def setting(
    variable: str, read: Callable[[str, str], Any], default: Any, low: float | None = None
) -> Any:
    """Declare one field: its variable, how its text is read, its default and its lower bound."""
    return field(default=default, metadata={"variable": variable, "read": read, "low": low})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the runtime; seconds and bytes unless a name says otherwise."""

    # RUF009 fears shared mutable defaults; setting() returns a dataclass field.
    #: ``auto``, ``threads``, ``gevent`` or ``eventlet``; decided at ``start()``.
    concurrency: str = setting("Z4J_CONCURRENCY", _text, "auto")
    #: ``auto``, ``ws`` or ``longpoll``. ``auto`` is WebSocket, and long-poll behind a proxy that blocks it.
    transport: str = setting("Z4J_TRANSPORT", _text, "auto")
    #: Start nothing at all.
    disabled: bool = setting("Z4J_DISABLED", _switch, False)
    #: Start nothing, and keep recorded events in ``runtime.recorded``: for the tests of whoever uses the agent.
    testing: bool = setting("Z4J_TESTING", _switch, False)
    #: Look for tasks again whenever a ``tasks.py`` changes.
    dev_mode: bool = setting("Z4J_DEV_MODE", _on, False)
    #: How long a captured event waits in memory at most: the loss window of a SIGKILL.
    flush_interval: float = setting("Z4J_FLUSH_INTERVAL_SECONDS", _seconds, 0.2, 0.01)
    #: How many of them wait at most.
    flush_events: int = setting("Z4J_FLUSH_EVENTS", _count, 256, 1)
    #: How long ``stop()`` waits for the brain's acks at most.
    flush_seconds: float = setting("Z4J_FLUSH_SECONDS", _seconds, 2.0, 0)
    #: Events that the ring holds when the flush loop cannot keep up; the oldest go first.
    ring_events: int = setting("Z4J_RING_EVENTS", _count, 10_000, 1)
    #: Send heartbeats. Off, the agent shows as offline after 30 s.
    heartbeat: bool = setting("Z4J_HEARTBEAT", _switch, True)
    #: Send no ``agent_status``, the agent's report on itself that the brain keeps as history.
    status_disabled: bool = setting("Z4J_AGENT_STATUS_DISABLED", _switch, False)
    #: Re-read at every connect, so that a rotated secret needs no restart.
    token_file: Path | None = setting("Z4J_TOKEN_FILE", _existing_file, None)  # noqa: RUF009
    hmac_secret_file: Path | None = setting("Z4J_HMAC_SECRET_FILE", _existing_file, None)  # noqa: RUF009
    #: PEM bundle of certificate authorities; ``SSL_CERT_FILE`` and ``REQUESTS_CA_BUNDLE`` are honoured after it.
    ca_bundle: Path | None = setting("Z4J_CA_BUNDLE", _existing_file, None)  # noqa: RUF009
    #: Client certificate (PEM, key included unless ``Z4J_CLIENT_KEY`` names it).
    client_cert: Path | None = setting("Z4J_CLIENT_CERT", _existing_file, None)  # noqa: RUF009
    client_key: Path | None = setting("Z4J_CLIENT_KEY", _existing_file, None)  # noqa: RUF009
    #: Send tasks' arguments, and what they return.
    capture_args: bool = setting("Z4J_CAPTURE_ARGS", _switch, True)
    capture_result: bool = setting("Z4J_CAPTURE_RESULT", _switch, True)
    #: How long a worker that ends for its restart has for the tasks that it runs.
    restart_grace: float = setting("Z4J_RESTART_GRACE_SECONDS", _seconds, 30.0, 0)
    #: How often the schedulers' schedules are told anew although nothing said that they changed; 0 is never.
    schedule_resync: float = setting("Z4J_SCHEDULE_RESYNC_SECONDS", _seconds, 900.0, 0)
    #: Commands that run at the same time.
    command_workers: int = setting("Z4J_COMMAND_WORKERS", _count, 8, 1)

    def __post_init__(self) -> None:
        for each in fields(self):
            low, value = each.metadata["low"], getattr(self, each.name)
            if low is not None and value < low:
                raise HostConfigurationError(
                    f"{each.metadata['variable']}={value} is below its minimum of {low}"
                )


def load_settings(env: Mapping[str, str] | None = None, **keywords: Any) -> Settings:
    """Return the settings in force; ``None`` among ``keywords`` means "not given".

    Raises ``HostConfigurationError`` naming the variable and what is wrong with it.
    """
    env = os.environ if env is None else env
    values: dict[str, Any] = {}
    for each in fields(Settings):
        variable, text = each.metadata["variable"], env.get(each.metadata["variable"], "").strip()
        if keywords.get(each.name) is not None:
            values[each.name] = keywords[each.name]
        elif text:
            values[each.name] = each.metadata["read"](variable, text)
    return Settings(**values)


def read_secret(path: Path, variable: str) -> str:
    """Return the one line that a secret's file holds.

    Raises ``HostConfigurationError`` when it cannot be read or is empty; the message never quotes the content.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise HostConfigurationError(f"{variable}={path}: {type(error).__name__}") from None
    if not text:
        raise HostConfigurationError(f"{variable}={path}: the file is empty")
    return text
