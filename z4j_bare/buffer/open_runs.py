"""Keeps the open runs in a memory-mapped file that survives ``SIGKILL``.

A run is one execution of a task. After the death of a process, an agent in another process reports
the dead process's open runs.

The file ``<store>.runs`` beside the process's store consists of a header, descriptions, and one
slot for each open run. A description contains the fields shared by all events of one task type and
one queue. A slot also keeps the end of a run until the event of the end is stored. The file
contains task ids, names and queues, but no arguments, results or messages.

The process holds a POSIX record lock on the file until the process ends or deletes the file.
Therefore a run that is open when the agent stops is reported only after the end of the process.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from operator import length_hint
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Protocol
from uuid import UUID, uuid5

from zope.interface import implementer

from z4j_bare.buffer import files
from z4j_bare.buffer.files import OwnerLock
from z4j_bare.errors import LocalStorageError
from z4j_bare.home import is_private
from z4j_bare.interfaces import (
    RUN_FAILED,
    RUN_OPEN,
    RUN_REDELIVERED,
    RUN_RETRIED,
    RUN_REVOKED,
    RUN_SUCCEEDED,
    IOpenRuns,
)
from z4j_bare.wire.frames import encode_fields

if TYPE_CHECKING:
    from pathlib import Path

#: Suffix that is appended to the name of the store. Older agents ignore files with this suffix.
SUFFIX = ".runs"

#: First bytes of the file. They identify the file's type and layout.
MAGIC = b"z4jruns1"
#: Header: magic, number of the last stored event, time of the last flush in seconds since the
#: epoch, length of the deployment id in bytes.
_HEADER = Struct("<8sQdH")
_FLUSHED = Struct("<Qd")
_FLUSHED_OFFSET = 8
_DEPLOYMENT_OFFSET = 64

#: Maximum number of descriptions in the file.
DESCRIPTIONS = 512
#: Bytes of each description, with the length of its text in the first two bytes.
DESCRIPTION_BYTES = 512
_LENGTH = Struct("<H")
_DESCRIPTIONS_OFFSET = 4096

#: Maximum number of runs: open runs, and ended runs whose end is not stored yet.
SLOTS = 4096
#: A slot: time of the start, time of the end, number of the description, length of the id, flags,
#: length of the note (exception class), id and note, state.
_SLOT = Struct("<ddHBBB3x224sQ")
SLOT_BYTES = _SLOT.size
#: A slot at the start of a run: the time of the end and the length of the note are zero.
_START = Struct("<d8xHBB4x224sQ")
#: Offsets within a slot in words of 8 bytes: the state, and the time of the end.
_STATE_WORD, _END_WORD = 31, 1
#: Maximum bytes of a task id and the note of the run together.
MAX_ID_BYTES = 224
_ID_OFFSET = 24
_FLAGS_OFFSET = 19
_NOTE_LENGTH_OFFSET = 20
_SLOTS_OFFSET = _DESCRIPTIONS_OFFSET + DESCRIPTIONS * DESCRIPTION_BYTES
FILE_BYTES = _SLOTS_OFFSET + SLOTS * SLOT_BYTES

#: The state of an ended run is ``event * _STATES | outcome``.
#: ``event`` is the number of the event that reports the end.
#: Thus one atomic write of 8 bytes ends a run. The state of an open run is ``RUN_OPEN``.
_STATES = 8

#: Namespace of the UUIDs of reported events.
_NAMESPACE = UUID("8a1f2c0e-5f5b-4c0e-9d0a-6b1d0f3a7c21")

DIED = "the worker process died while it ran"
DELIVERED_AGAIN = f"{DIED}; the broker delivers the task again"
END_NOT_REPORTED = "the worker process died before it reported this error's message"


class _Ring(Protocol):
    """The part of the ring that :class:`OpenRuns` reads."""

    #: Number of events that were appended to the ring.
    produced: int


@implementer(IOpenRuns)
class OpenRuns:
    """Keeps the open runs of this process.

    :meth:`start` and :meth:`end` run in the host's tasks: they write to mapped memory, take no lock
    and never raise. Before :meth:`attach`, the memory is not a file and is lost with the process.

    :param deployment: returns the deployment id. Only agents of this deployment report the runs.
    """

    def __init__(self, ring: _Ring, deployment: Callable[[], str] = str) -> None:
        #: Number of runs that were not kept, because all slots were used, the task id was too long,
        #: or the description was not stored.
        self.not_kept = 0
        # next() on a count is atomic between native threads. ``+= 1`` is not.
        self._not_kept_counter = count(1)
        self._ring = ring
        self._deployment = deployment
        self._lock: OwnerLock | None = None
        #: The slots that were never used.
        #: The offset of a slot in the file identifies the slot; 0 means no slot.
        self._unused = iter(range(_SLOTS_OFFSET, FILE_BYTES, SLOT_BYTES))
        self._free: list[int] = []
        self._ended: deque[int] = deque()
        self._described = count()
        self._write = _START.pack_into
        self._enabled = False
        self._map: mmap.mmap
        self._words: memoryview
        self._times: memoryview[float]

    def enable(self) -> None:
        """Allocate the memory for the runs."""
        if not self._enabled:
            self._use(mmap.mmap(-1, FILE_BYTES))
            self._enabled = True

    # -- in the host's tasks

    def describe(self, engine: str, data: Mapping[str, object]) -> int:
        """Store a description of some runs. Return the new number, or -1 if there is no room.

        :param data: the fields that are equal in the ``data`` of all events of these runs.
        """
        text = json.dumps({"engine": engine, "data": data}, ensure_ascii=False).encode(
            errors="replace"
        )
        number = next(self._described)
        if number >= DESCRIPTIONS or len(text) > DESCRIPTION_BYTES - _LENGTH.size:
            return -1
        offset = _DESCRIPTIONS_OFFSET + number * DESCRIPTION_BYTES
        self._map[offset + _LENGTH.size : offset + _LENGTH.size + len(text)] = text
        _LENGTH.pack_into(self._map, offset, len(text))
        return number

    def start(self, description: int, task_id: str, at: float, flags: int) -> int:
        """Keep a run that starts. Return its slot, or 0 if the run cannot be kept.

        :param description: the number that :meth:`describe` returned.
        :param at: time of the start, in seconds since the epoch.
        :param flags: :data:`RUN_REDELIVERED` or 0.
        """
        try:
            text = task_id.encode()
            length = len(text)
            if length <= MAX_ID_BYTES and description >= 0:
                # ``pop`` without a check: another thread could take the last slot after a check.
                try:
                    slot = self._free.pop()
                except IndexError:
                    slot = next(self._unused)
                self._write(self._map, slot, at, description, length, flags, text, RUN_OPEN)
                return slot
        except Exception:
            pass
        self.not_kept = next(self._not_kept_counter)
        return 0

    def end(self, slot: int, outcome: int, at: float, note: str = "") -> None:
        """Keep the end of a run until the event that reports the end is stored.

        The event must already be in the ring.

        :param slot: the slot that :meth:`start` returned. The end of slot 0 is ignored.
        :param outcome: how the run ended, such as ``RUN_FAILED``; ``RUN_ENDED`` if no event reports
            the end.
        :param at: time of the end, in seconds since the epoch.
        :param note: the name of the exception class of a failed run.
        """
        if slot:
            place = slot >> 3
            self._times[place + _END_WORD] = at
            if note:
                self._add_note(slot, note)
            self._words[place + _STATE_WORD] = self._ring.produced * _STATES | outcome
            self._ended.append(slot)

    def acknowledged(self, slot: int) -> None:
        """Record that the broker does not deliver the message of an open run again.

        :param slot: the slot that :meth:`start` returned. For 0, nothing is done.
        """
        if slot:
            self._map[slot + _FLAGS_OFFSET] = 0

    def _add_note(self, slot: int, note: str) -> None:
        start = self._map[slot + 18]
        text = note.encode(errors="replace")[: MAX_ID_BYTES - start]
        first = slot + _ID_OFFSET + start
        self._map[first : first + len(text)] = text
        self._map[slot + _NOTE_LENGTH_OFFSET] = len(text)

    # -- in the flush loop

    def stored(self, number: int, at: float) -> None:
        """Free the slots of the runs whose end is stored.

        :param number: the number of the last stored event.
        :param at: time at which the flush of that event began, in seconds since the epoch.
        """
        if self._enabled:
            _FLUSHED.pack_into(self._map, _FLUSHED_OFFSET, number, at)
            # Freed slots keep their states.
            # The agent that reads the file ignores states whose event number is at most ``number``.
            ended, words, free, limit = self._ended, self._words, self._free, (number + 1) * _STATES
            while ended:
                slot = ended[0]
                if words[(slot >> 3) + _STATE_WORD] >= limit:
                    return
                free.append(slot)
                ended.popleft()

    # -- on the native thread

    def attach(self, store: Path) -> None:
        """Move the runs to a file beside ``store``; after an error, they stay in memory only."""
        if not self._enabled:
            return
        lock = None
        try:
            lock = OwnerLock(runs_path(store))
            # Allocate all pages: on a full disk, a write to an unallocated page kills the process.
            os.posix_fallocate(lock.descriptor, 0, FILE_BYTES)
            mapped = mmap.mmap(lock.descriptor, FILE_BYTES)
        except (OSError, LocalStorageError):
            if lock is not None:
                lock.release(delete=True)
            return
        names = self._deployment().encode()
        # Other threads may start runs before ``_use`` copies the memory.
        # Therefore 64 slots beyond the used slots are copied.
        end = min(FILE_BYTES, FILE_BYTES - length_hint(self._unused) * SLOT_BYTES + 16_384)
        # CPython switches threads only at calls and loops.
        # Therefore no other thread runs between the copy and the switch to the file in ``_use``.
        self._use(mapped, end)
        mapped[_DEPLOYMENT_OFFSET : _DEPLOYMENT_OFFSET + len(names)] = names
        number, at = _FLUSHED.unpack_from(mapped, _FLUSHED_OFFSET)
        _HEADER.pack_into(mapped, 0, MAGIC, number, at, len(names))
        # POSIX drops a lock when the process closes any descriptor of the file.
        # ``mapped`` has a duplicate of the descriptor, so the lock keeps ``mapped`` open.
        lock.pinned = mapped
        previous, self._lock = self._lock, lock
        if previous is not None:
            previous.release(delete=True)

    def close(self) -> None:
        """Delete the file if no run is open and every end is stored.

        In all other cases the file stays locked until the process ends. Then another agent reports
        the runs in the file.
        """
        if self._lock is not None and not self._ended and not self._any_open():
            self._lock.release(delete=True)
            self._lock = None

    def _any_open(self) -> bool:
        end = FILE_BYTES - length_hint(self._unused) * SLOT_BYTES
        places = range((_SLOTS_OFFSET >> 3) + _STATE_WORD, end >> 3, SLOT_BYTES >> 3)
        return any(self._words[place] == RUN_OPEN for place in places)

    def _use(self, mapped: mmap.mmap, copied: int = 0) -> None:
        view = memoryview(mapped)
        words, times = view.cast("Q"), view.cast("d")
        if copied:
            mapped[:copied] = self._map[:copied]
        self._map = mapped
        self._words = words
        self._times = times


class Run(NamedTuple):
    """The content of a used slot. Times are in seconds since the epoch."""

    number: int
    started: float
    ended: float
    description: int
    redelivered: bool
    task_id: str
    note: str
    outcome: int


class OrphanRuns:
    """The file of open runs of a dead process.

    The constructor locks the file. The constructor raises ``LocalStorageError`` if the process runs
    or the file belongs to another deployment.
    """

    def __init__(self, path: Path, deployment: str) -> None:
        self.path = path
        self._lock = OwnerLock(path)
        try:
            self._content = os.pread(self._lock.descriptor, FILE_BYTES, 0)
            valid = len(self._content) == FILE_BYTES and self._content.startswith(MAGIC)
            if valid and not self._is_of(deployment):
                raise LocalStorageError(f"the runs in {path} belong to another deployment")
        except OSError as error:
            self._lock.release()
            raise LocalStorageError(f"cannot read {path}: {error.strerror}") from error
        except LocalStorageError:
            self._lock.release()
            raise
        if not valid:  # the process died while it created the file
            self._content = b""

    def __len__(self) -> int:
        return len(self._runs())

    def events(self) -> list[bytes]:
        """Return the encoded events that report the end of each run.

        Events and their ids depend only on the file's name and content. Therefore the brain
        recognises an event that is reported twice.
        """
        return [event for run in self._runs() for event in self._report(run)]

    def release(self, *, delete: bool) -> None:
        """Unlock the file.

        :param delete: whether to delete the file as well, because the events of its runs are
            stored.
        """
        self._lock.release(delete=delete)

    def _is_of(self, deployment: str) -> bool:
        _, _, _, length = _HEADER.unpack_from(self._content)
        stored = self._content[_DEPLOYMENT_OFFSET : _DEPLOYMENT_OFFSET + length]
        names = stored.decode(errors="replace")
        return names == deployment or not set(names.split()).isdisjoint(deployment.split())

    def _runs(self) -> list[Run]:
        return sorted(_used_slots(self._content), key=lambda run: run.started)

    def _report(self, run: Run) -> Iterator[bytes]:
        flushed: float = _FLUSHED.unpack_from(self._content, _FLUSHED_OFFSET)[1]
        try:
            shared = self._description(run.description)
        except (ValueError, struct.error):  # a damaged file
            return
        if run.started >= flushed:  # the event of the run's start may be lost
            yield self._event(run, shared, "task.started", run.started, {})
        if run.outcome == RUN_OPEN:
            at = max(run.started, flushed)
            if run.redelivered:
                yield self._event(run, shared, "task.retried", at, {"reason": DELIVERED_AGAIN})
            else:
                own = {"exception": "WorkerLostError", "exception_message": DIED}
                yield self._event(run, shared, "task.failed", at, own)
        else:
            kind, fields = _END[run.outcome]
            if run.outcome == RUN_FAILED:
                fields = {"exception": run.note or "Exception", **fields}
            yield self._event(run, shared, kind, max(run.started, run.ended), fields)

    def _description(self, number: int) -> dict[str, dict[str, object]]:
        offset = _DESCRIPTIONS_OFFSET + number * DESCRIPTION_BYTES
        length = _LENGTH.unpack_from(self._content, offset)[0]
        first = offset + _LENGTH.size
        found: dict[str, dict[str, object]] = json.loads(self._content[first : first + length])
        return found

    def _event(
        self,
        run: Run,
        shared: Mapping[str, Mapping[str, object]],
        kind: str,
        at: float,
        own: Mapping[str, object],
    ) -> bytes:
        return encode_fields(
            {
                "data": {**shared["data"], **own},
                "engine": shared["engine"],
                "id": str(uuid5(_NAMESPACE, f"{self.path.name} {run.number} {at} {kind}")),
                "kind": kind,
                "occurred_at": datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds"),
                "task_id": run.task_id,
            }
        )


#: Kind and fields of the event that reports the end of a run, by outcome.
_END: dict[int, tuple[str, dict[str, object]]] = {
    RUN_SUCCEEDED: ("task.succeeded", {}),
    RUN_FAILED: ("task.failed", {"exception_message": END_NOT_REPORTED}),
    RUN_RETRIED: ("task.retried", {"reason": END_NOT_REPORTED}),
    RUN_REVOKED: ("task.revoked", {}),
}


def _used_slots(content: bytes) -> Iterator[Run]:
    """Yield the open runs, and the ended runs whose last event was not stored."""
    if not content:
        return
    stored: int = _FLUSHED.unpack_from(content, _FLUSHED_OFFSET)[0]
    for number, slot in enumerate(_SLOT.iter_unpack(content[_SLOTS_OFFSET:])):
        started, ended, description, length, flags, note_length, text, state = slot
        event, outcome = divmod(state, _STATES)
        if outcome == RUN_OPEN or (outcome in _END and event > stored):
            yield Run(
                number,
                started,
                ended,
                description,
                bool(flags & RUN_REDELIVERED),
                text[:length].decode(errors="replace"),
                text[length : length + note_length].decode(errors="replace"),
                outcome,
            )


def runs_path(store: Path) -> Path:
    """Return the path of the ``.runs`` file of a store."""
    return store.with_name(store.name + SUFFIX)


def orphaned_runs(buffer_path: str | os.PathLike[str]) -> list[Path]:
    """Return the ``.runs`` files whose store was deleted after all its rows were adopted.

    The owner of such a file may still run. :class:`OrphanRuns` checks this.
    """
    found = []
    for directory in files.candidate_directories(buffer_path):
        if is_private(directory):
            with suppress(OSError):
                found += [
                    path
                    for path in sorted(directory.glob(f"{files.PREFIX}*{files.SUFFIX}{SUFFIX}"))
                    if not path.with_name(path.name.removesuffix(SUFFIX)).exists()
                ]
    return found
