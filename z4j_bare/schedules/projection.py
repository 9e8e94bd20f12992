"""Schedules as the brain takes them (``brain-contract`` 5.7): rows, snapshots in frames, digests. No I/O.

A row is encoded once, and bodies, digests and events are put together around those bytes; ``z4j_core`` defines the same
bodies as dictionaries, and a property test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from z4j_core.schedule_external import (
    EXTERNAL_SCHEDULE_PROTOCOL_VERSION,
    external_schedule_source_scope,
    normalize_external_schedule,
)

from z4j_bare.errors import CommandError
from z4j_bare.wire.canonical import canonical_plain, to_json_types

if TYPE_CHECKING:
    from z4j_bare.events.redaction import Redactor

#: Bytes of rows in one frame; with all that goes around them it stays below what the sender puts into one, 128 KiB.
FRAME_BYTES = 96 * 1024

#: Bytes of the largest row; half the brain's frame of 1 MiB.
ROW_BYTES = 512 * 1024

#: How deep arguments may be nested: the brain hides what is deeper than 64 levels, its own envelope included.
DEPTH = 50

#: What a row is known by. Where redaction would swallow that, a digest of it stands in: it has to tell rows apart.
_NAMES = ("source_key", "external_id", "name")

Breathe = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Authority:
    """The right to speak for one scheduler: what the brain grants with each activation."""

    owner: str
    source_scope: str
    stream_id: str
    epoch_uuid: str
    epoch_number: int
    adapter_instance_id: str

    @classmethod
    def of(cls, parameters: Mapping[str, Any], owner: str) -> Authority:
        """Read a command's parameters. Raises ``CommandError`` for what is no authority over ``owner``."""
        texts = [
            parameters.get(name)
            for name in ("source_scope", "stream_id", "epoch_uuid", "adapter_instance_id")
        ]
        number = parameters.get("epoch_number")
        if not all(isinstance(text, str) and text for text in texts):
            raise CommandError(
                "source_scope, stream_id, epoch_uuid and adapter_instance_id of the stream are required"
            )
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise CommandError("the stream's epoch_number must be a whole number from 1")
        scope, stream, epoch, instance = map(str, texts)
        if scope != external_schedule_source_scope(owner):
            raise CommandError(f"source_scope is not the whole of {owner}")
        return cls(owner, scope, stream, epoch, number, instance)

    def named(self) -> dict[str, Any]:
        """Return how it is named in a command's result."""
        return {
            "stream_id": self.stream_id,
            "epoch_uuid": self.epoch_uuid,
            "epoch_number": self.epoch_number,
            "adapter_instance_id": self.adapter_instance_id,
        }

    def body(self, sequence: int, **fields: Any) -> dict[str, Any]:
        """Return a body without its rows."""
        return {
            "protocol_version": EXTERNAL_SCHEDULE_PROTOCOL_VERSION,
            **self.named(),
            "sequence": sequence,
            "owner": self.owner,
            "source_scope": self.source_scope,
            "stable_source": True,
            "schedules": [],
            **fields,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule: what the adapter says of it, what the brain shall know of that, and the latter as canonical bytes."""

    source: dict[str, Any]
    fields: dict[str, Any]
    encoded: bytes

    @property
    def native(self) -> str:
        """The adapter's name of the schedule."""
        return str(self.source["source_key"])

    @property
    def key(self) -> str:
        """The brain's name of the schedule."""
        return str(self.fields["source_key"])


def row_of(schedule: Any, owner: str, redactor: Redactor) -> Row:
    """Return an adapter's ``Schedule`` as a row, redacted. Raises ``ValueError`` for one that cannot be told."""
    source = normalize_external_schedule(to_json_types(_dumped(schedule), DEPTH), owner=owner)
    fields: dict[str, Any] = redactor.scrub(source)
    for name in _NAMES:
        if fields[name] != source[name]:
            fields[name] = known_as(source[name], redactor)
    encoded = canonical_plain(fields)
    if len(encoded) > ROW_BYTES:
        raise ValueError(
            f"schedule {fields['name']} takes {len(encoded)} bytes, over the limit of {ROW_BYTES}"
        )
    return Row(source, fields, encoded)


def known_as(name: str, redactor: Redactor) -> str:
    """Return what the brain calls a schedule that the adapter calls ``name``: that, unless redaction would swallow it."""
    return (
        name
        if redactor.scrub(name) == name
        else f"redacted-{sha256(name.encode()).hexdigest()[:16]}"
    )


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Return rows in the order of a snapshot. Raises ``ValueError`` when two have one key."""
    found = sorted(rows, key=lambda row: row.key)
    for first, second in pairwise(found):
        if first.key == second.key:
            raise ValueError(f"two schedules have the key {first.key}")
    return found


def snapshot(
    authority: Authority, sequence: int, rows: Sequence[Row], reason: str, checkpoint: Breathe
) -> list[bytes]:
    """Return the events of a complete snapshot: frames of rows, then the terminal one. ``rows`` are :func:`ordered`."""
    whole = authority.body(
        sequence, kind="snapshot", complete=True, operation_id=None, deleted_source_keys=[]
    )
    chunks = list(_chunks(rows))
    common = {
        "snapshot_id": str(uuid4()),
        "frame_count": len(chunks),
        "row_count": len(rows),
        "snapshot_digest": _digest(_around(whole, rows), checkpoint),
    }
    events = []
    for index, chunk in enumerate([*chunks, []]):
        kind = "rows" if index < len(chunks) else "terminal"
        body = authority.body(sequence, frame_kind=kind, frame_index=index, **common)
        pieces = [b"".join(_around(body, chunk))]
        digest = _digest(pieces, checkpoint)
        events.append(
            _event(
                authority, "schedule.snapshot", "external_snapshot_frame", pieces[0], digest, reason
            )
        )
        checkpoint()
    return events


def control(authority: Authority, sequence: int, row: Row, operation: str, reason: str) -> bytes:
    """Return the event that confirms a control operation by what the scheduler now says of the one schedule."""
    body = authority.body(
        sequence, kind="control", complete=False, operation_id=operation, deleted_source_keys=[]
    )
    payload = b"".join(_around(body, [row]))
    digest = sha256(payload).hexdigest()
    return _event(authority, "schedule.updated", "external_projection", payload, digest, reason)


def digest_of(fields: Mapping[str, Any]) -> str:
    """Return the digest of one row or body that came as JSON."""
    return sha256(canonical_plain(dict(fields))).hexdigest()


def _dumped(schedule: Any) -> Mapping[str, Any]:
    """Return the fields of an adapter's model; arguments that are no JSON become text later."""
    try:
        fields: Mapping[str, Any] = schedule.model_dump(mode="json")
    except AttributeError:
        raise ValueError(f"{type(schedule).__name__} is no schedule") from None
    except Exception:
        fields = schedule.model_dump()
    return fields


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        if chunk and size + len(row.encoded) > FRAME_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += len(row.encoded) + 1
    if chunk:
        yield chunk


def _around(body: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[bytes]:
    """Yield the canonical bytes of a body with its rows, in pieces."""
    # No string can hold this: its quotes would be escaped. And no other key ends like that.
    head, mark, tail = canonical_plain(dict(body)).partition(b'"schedules":[')
    yield head + mark
    for number, row in enumerate(rows):
        yield b"," + row.encoded if number else row.encoded
    yield tail


def _digest(pieces: Iterator[bytes] | Sequence[bytes], checkpoint: Breathe) -> str:
    found = sha256()
    for piece in pieces:
        found.update(piece)
        checkpoint()
    return found.hexdigest()


def _event(
    authority: Authority, kind: str, form: str, body: bytes, digest: str, reason: str
) -> bytes:
    name = "frame_digest" if form == "external_snapshot_frame" else "payload_digest"
    fields = {
        "id": str(uuid4()),
        "kind": kind,
        "engine": authority.owner,
        "task_id": "",
        "occurred_at": datetime.now(UTC).isoformat(),
        "data": {form: None, name: digest, "reason": reason},
    }
    head, mark, tail = canonical_plain(fields).partition(f'"{form}":'.encode())
    return head + mark + body + tail.removeprefix(b"null")
