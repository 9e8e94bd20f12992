"""Isolation of poison rows: the brain ends every session in which it receives one.

A row becomes a suspect when it was in flight in two sessions that the brain ended because of a
frame. Suspected rows are sent in isolation: nothing else is in flight. If they end the session, a
smaller part of them is sent in the next one, until one row is left. The count is stored with the
row, so the search continues after a restart, and in a process that adopts the store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from z4j_bare.buffer.rows import POISON, RESULT
from z4j_bare.errors import AgentError, PoisonRowError
from z4j_bare.wire import close_codes

if TYPE_CHECKING:
    from z4j_bare.buffer.manager import BufferManager
    from z4j_bare.buffer.rows import BufferEntry

logger = logging.getLogger("z4j.runtime.pipeline.poison")

#: A row becomes a suspect when the brain has ended this many sessions because of a frame while the
#: row was in flight.
SUSPECT_AFTER = 2

#: A set of suspected rows is split into this many parts. Of 500 events, 63 are tried, then 8, then
#: 1, which takes four more sessions. Halving would take ten. A failed session costs seconds; an
#: accepted part costs a hundredth of a second.
SPLIT_FACTOR = 8


class PoisonIsolation:
    """The search for poison rows within one session."""

    def __init__(self) -> None:
        #: The suspected rows that are in flight alone.
        self.isolated: Sequence[BufferEntry] = ()
        #: Whether the brain has acknowledged anything in this session. Before that, suspected rows
        #: are not sent, because a cause that ends every session would be attributed to them.
        self.session_works = False
        #: Rows of the upload in progress, over a transport with synchronous acks.
        self.uploading: Sequence[BufferEntry] = ()
        #: The error that the last upload failed with.
        self.upload_error: AgentError | None = None

    def on_session_error(
        self, error: AgentError, in_flight: Sequence[int], buffer: BufferManager, generation: int
    ) -> AgentError:
        """Mark the rows that may have caused the session's end; return the error to report.

        The only suspect, in a session that worked until then, is dropped and counted as lost.

        :param in_flight: ids of the rows that are sent and not acknowledged.
        """
        if not close_codes.may_be_poison(error) or not in_flight:
            return error
        suspected = [entry for entry in self.isolated if entry.id in in_flight]
        if len(in_flight) == len(suspected) == 1:
            buffer.discard(in_flight, POISON, generation)
            logger.warning(
                "z4j: dropped a row that the brain cannot accept: %s (%s)",
                describe(suspected[0]),
                error,
            )
        else:
            buffer.increment_attempts(in_flight, generation)
        if not suspected:
            return error
        return PoisonRowError(str(error), code=getattr(error, "code", None))


def next_trial(
    results: Sequence[BufferEntry], events: Sequence[BufferEntry]
) -> tuple[list[BufferEntry], list[BufferEntry], list[BufferEntry]]:
    """Return the results and events before the first suspected row, and the rows to try next.

    The next trial is an eighth of the first run of suspected rows with equal counts. A trial takes
    rows from the front, so the rows of the last failed trial are now a smaller run at the front.
    """
    clear_results = list(takewhile(_is_clear, results))
    clear_events = list(takewhile(_is_clear, events))
    if len(clear_results) < len(results):
        return clear_results, clear_events, [results[len(clear_results)]]
    return clear_results, clear_events, _first_part(events[len(clear_events) :])


def describe(entry: BufferEntry) -> str:
    """Return a text that identifies a row in a log and contains none of its data."""
    size = f"{len(entry.payload)} bytes"
    if entry.kind == RESULT:
        return f"the result of command {entry.key}, {size}"
    try:
        fields: object = json.loads(entry.payload)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        return f"a row that is not an event, {size}"
    kind, engine, task = (str(fields.get(name))[:200] for name in ("kind", "engine", "task_id"))
    return f"a {kind!r} of {engine!r}, task {task!r}, {size}"


def _is_clear(entry: BufferEntry) -> bool:
    return entry.attempts < SUSPECT_AFTER


def _first_part(suspected: Sequence[BufferEntry]) -> list[BufferEntry]:
    if not suspected:
        return []
    same_count = list(takewhile(lambda entry: entry.attempts == suspected[0].attempts, suspected))
    return same_count[: -(-len(same_count) // SPLIT_FACTOR)]
