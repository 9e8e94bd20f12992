"""The numbers that the heartbeat, ``runtime.stats()`` and the tests read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Totals since ``start()``. Only the loop that owns a number writes it."""

    stored: int = 0
    sent: int = 0
    frames: int = 0
    sessions: int = 0
    heartbeats: int = 0
    commands: int = 0
    unencodable: int = 0
    recut: int = 0
    restarts: Counter[str] = field(default_factory=Counter)
    last_flush_at: float | None = None
    last_error: str = ""
    transport: str = ""
