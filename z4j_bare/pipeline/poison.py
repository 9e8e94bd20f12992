"""Isolates poison rows. The brain ends every session in which it receives a poison row.

A row becomes suspected when it was in flight in two sessions that the brain ended because of a
frame. The sender sends suspected rows in isolation, that is, while no other row is in flight. If
the brain ends this session as well, the next session sends a smaller part of the suspected rows,
until one row is left. The search continues after a restart, and in a process that adopts the store,
because the store keeps the number of failed sessions with each row.
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

#: A row is suspected after this many sessions that the brain ended because of a frame while the row
#: was in flight.
SUSPECT_AFTER = 2

#: Number of parts into which a set of suspected rows is split. Of 500 suspected events, the sender
#: tries 63, then 8, then 1. After the first :data:`SUSPECT_AFTER` sessions, this search takes four
#: sessions, and halving would take ten. A failed session costs seconds, and an accepted part costs
#: a hundredth of a second.
SPLIT_FACTOR = 8


class PoisonIsolation:
    """The state of the search for poison rows in one session."""

    def __init__(self) -> None:
        #: The suspected rows in flight. No other row is in flight at the same time.
        self.isolated: Sequence[BufferEntry] = ()
        #: Whether the brain has acknowledged a frame in this session.
        #: Before the first ack, a session may end for other reasons than a poison row.
        self.session_works = False
        #: Rows of the last upload. Read only if the transport has synchronous acks.
        self.uploading: Sequence[BufferEntry] = ()
        #: The error of the last upload, if it failed.
        self.upload_error: AgentError | None = None

    def on_session_error(
        self, error: AgentError, in_flight: Sequence[int], buffer: BufferManager, generation: int
    ) -> AgentError:
        """Mark the rows that may have caused the session's end; return the error to report.

        If the only row in flight is a suspected row, drop the row and count it as lost. Otherwise
        increment the attempts of every row in flight.

        :param in_flight: ids of the rows that were sent and are not acknowledged.
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
    """Return the results and the events before the first suspected row, and the rows to try next.

    If there is a suspected result, only this result is tried. Otherwise the first eighth of the
    leading suspected events with the same number of attempts is tried. A failed trial increments
    the attempts of its rows, so the next trial takes an eighth of those rows.
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
