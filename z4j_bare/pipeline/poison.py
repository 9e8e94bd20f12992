"""Which rows may be what the brain cannot take, and which of them to try next.

A row that was on its way when the brain ended two sessions over a frame is a suspect. Suspects are tried apart: nothing
else is on its way, and after each death only a part of them, until the one is alone. The count is the row's own, in the
store, so that the search goes on after a restart, and with an heir.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.rows import RESULT

if TYPE_CHECKING:
    from z4j_bare.buffer.rows import BufferEntry

#: Deaths of sessions that make a suspect of what was on its way.
DEATHS = 2

#: Into how many parts a set of suspects is divided: 500 events are 63, 8 and 1, four deaths more. With two it would be
#: ten, and as the brain answers between them, most parts cost a hundredth of a second, a death seconds.
PARTS = 8


def part(
    results: Sequence[BufferEntry], events: Sequence[BufferEntry]
) -> tuple[list[BufferEntry], list[BufferEntry], list[BufferEntry]]:
    """Return the results and events in front of the first suspects, and what to try apart behind those.

    Suspects that have gone through the same number of deaths are a set, and an eighth of it is next: who died once more is
    in front of the others, and a smaller set.
    """
    calm_results, calm_events = list(takewhile(_calm, results)), list(takewhile(_calm, events))
    if len(calm_results) < len(results):
        return calm_results, calm_events, [results[len(calm_results)]]
    return calm_results, calm_events, _first_part(events[len(calm_events) :])


def describe(entry: BufferEntry) -> str:
    """Return what may be said of a row in a log: which one it is, and nothing that it holds."""
    size = f"{len(entry.payload)} bytes"
    if entry.kind == RESULT:
        return f"the result of command {entry.key}, {size}"
    try:
        fields: Any = json.loads(entry.payload)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return f"a row that is no event, {size}"
    kind, engine, task = (str(fields.get(name))[:200] for name in ("kind", "engine", "task_id"))
    return f"a {kind!r} of {engine!r}, task {task!r}, {size}"


def _calm(entry: BufferEntry) -> bool:
    return entry.attempts < DEATHS


def _first_part(suspects: Sequence[BufferEntry]) -> list[BufferEntry]:
    if not suspects:
        return []
    alike = list(takewhile(lambda entry: entry.attempts == suspects[0].attempts, suspects))
    return alike[: -(-len(alike) // PARTS)]
