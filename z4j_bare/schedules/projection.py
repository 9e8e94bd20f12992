"""Projections of schedules: rows, snapshots and digests (``docs/protocol.md``, "Schedules").

Each row is encoded once. Bodies, digests and events contain the encoded bytes of the row.
``z4j_core`` defines the same bodies as dictionaries, and a property test compares both results. The
module does no I/O.
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
    from z4j_core.models import Schedule

    from z4j_bare.events.redaction import Redactor

#: Maximum bytes of all rows in one frame. The frame stays below the sender's limit of 128 KiB.
#: A larger row is sent in a frame of its own.
MAX_CHUNK_BYTES = 96 * 1024

#: Maximum bytes of one row. It is half of 1 MiB, the brain's maximum size of a frame.
MAX_ROW_BYTES = 512 * 1024

#: Maximum nesting levels of a schedule.
#: The brain redacts all values below level 64, and also counts the levels of the envelope.
MAX_DEPTH = 50

#: Fields that identify a row and must stay unique.
#: If redaction would change such a field, a digest replaces its value.
_IDENTIFIERS = ("source_key", "external_id", "name")

Checkpoint = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Authority:
    """The brain's permission to publish a scheduler's schedules, granted at each activation."""

    owner: str
    source_scope: str
    stream_id: str
    epoch_uuid: str
    epoch_number: int
    adapter_instance_id: str

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], owner: str) -> Authority:
        """Return the authority that a command's parameters grant.

        Raises ``CommandError`` if the parameters grant no authority over ``owner``.
        """
        texts = [
            parameters.get(name)
            for name in ("source_scope", "stream_id", "epoch_uuid", "adapter_instance_id")
        ]
        number = parameters.get("epoch_number")
        if not all(isinstance(text, str) and text for text in texts):
            raise CommandError(
                "source_scope, stream_id, epoch_uuid and adapter_instance_id are required"
            )
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise CommandError("the stream's epoch_number must be an integer of 1 or more")
        scope, stream, epoch, instance = map(str, texts)
        if scope != external_schedule_source_scope(owner):
            raise CommandError(f"source_scope does not cover all of {owner}")
        return cls(owner, scope, stream, epoch, number, instance)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that identify the authority in a command's result."""
        return {
            "stream_id": self.stream_id,
            "epoch_uuid": self.epoch_uuid,
            "epoch_number": self.epoch_number,
            "adapter_instance_id": self.adapter_instance_id,
        }

    def body(self, sequence: int, **fields: Any) -> dict[str, Any]:
        """Return the body of a projection without its rows."""
        return {
            "protocol_version": EXTERNAL_SCHEDULE_PROTOCOL_VERSION,
            **self.as_dict(),
            "sequence": sequence,
            "owner": self.owner,
            "source_scope": self.source_scope,
            "stable_source": True,
            "schedules": [],
            **fields,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule.

    ``source`` contains the adapter's fields, and ``fields`` the redacted fields. ``encoded`` is
    ``fields`` as canonical bytes.
    """

    source: dict[str, Any]
    fields: dict[str, Any]
    encoded: bytes

    @property
    def adapter_key(self) -> str:
        """The key by which the adapter identifies the schedule."""
        return str(self.source["source_key"])

    @property
    def key(self) -> str:
        """The key by which the brain identifies the schedule."""
        return str(self.fields["source_key"])


def make_row(schedule: Schedule, owner: str, redactor: Redactor) -> Row:
    """Return an adapter's schedule as a redacted row.

    Raises ``ValueError`` if the schedule cannot be published.
    """
    source = normalize_external_schedule(
        to_json_types(_fields_of(schedule), MAX_DEPTH), owner=owner
    )
    fields: dict[str, Any] = redactor.scrub(source)
    for name in _IDENTIFIERS:
        if fields[name] != source[name]:
            fields[name] = public_key(source[name], redactor)
    encoded = canonical_plain(fields)
    if len(encoded) > MAX_ROW_BYTES:
        raise ValueError(
            f"schedule {fields['name']} has {len(encoded)} bytes, over the limit of {MAX_ROW_BYTES}"
        )
    return Row(source, fields, encoded)


def public_key(name: str, redactor: Redactor) -> str:
    """Return ``name``, or a digest of ``name`` if redaction would change the name."""
    return (
        name
        if redactor.scrub(name) == name
        else f"redacted-{sha256(name.encode()).hexdigest()[:16]}"
    )


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows sorted by key. Raises ``ValueError`` if two rows have the same key."""
    ordered = sorted(rows, key=lambda row: row.key)
    for first, second in pairwise(ordered):
        if first.key == second.key:
            raise ValueError(f"two schedules have the key {first.key}")
    return ordered


def snapshot(
    authority: Authority, sequence: int, rows: Sequence[Row], reason: str, checkpoint: Checkpoint
) -> list[bytes]:
    """Return the events of a complete snapshot: the frames with rows, then the terminal frame.

    ``rows`` must be a result of :func:`sort_rows`. ``checkpoint`` is called after each row, and may
    yield to other tasks.
    """
    snapshot_body = authority.body(
        sequence, kind="snapshot", complete=True, operation_id=None, deleted_source_keys=[]
    )
    chunks = list(_chunks(rows))
    common = {
        "snapshot_id": str(uuid4()),
        "frame_count": len(chunks),
        "row_count": len(rows),
        "snapshot_digest": _digest(_splice_rows(snapshot_body, rows), checkpoint),
    }
    events = []
    for index, chunk in enumerate([*chunks, []]):
        kind = "rows" if index < len(chunks) else "terminal"
        body = authority.body(sequence, frame_kind=kind, frame_index=index, **common)
        pieces = [b"".join(_splice_rows(body, chunk))]
        frame_digest = _digest(pieces, checkpoint)
        events.append(
            _event(
                authority,
                "schedule.snapshot",
                "external_snapshot_frame",
                pieces[0],
                frame_digest,
                reason,
            )
        )
        checkpoint()
    return events


def control(authority: Authority, sequence: int, row: Row, operation: str, reason: str) -> bytes:
    """Return the event that confirms a control operation with the current row of its schedule."""
    body = authority.body(
        sequence, kind="control", complete=False, operation_id=operation, deleted_source_keys=[]
    )
    payload = b"".join(_splice_rows(body, [row]))
    payload_digest = sha256(payload).hexdigest()
    return _event(
        authority, "schedule.updated", "external_projection", payload, payload_digest, reason
    )


def digest(fields: Mapping[str, Any]) -> str:
    """Return the digest of a row or body that was parsed from JSON."""
    return sha256(canonical_plain(dict(fields))).hexdigest()


def _fields_of(schedule: Schedule) -> Mapping[str, Any]:
    """Return the fields of ``schedule``, a Pydantic model.

    Some values may not be JSON types. The caller converts these values to text.
    """
    try:
        fields: Mapping[str, Any] = schedule.model_dump(mode="json")
    except AttributeError:
        raise ValueError(f"{type(schedule).__name__} is not a schedule") from None
    except Exception:
        fields = schedule.model_dump()
    return fields


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        if chunk and size + len(row.encoded) > MAX_CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += len(row.encoded) + 1
    if chunk:
        yield chunk


def _splice_rows(body: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[bytes]:
    """Yield the canonical bytes of a body that contains ``rows``, in pieces."""
    # The marker occurs only once, because quotes inside a string are escaped.
    head, marker, tail = canonical_plain(dict(body)).partition(b'"schedules":[')
    yield head + marker
    for number, row in enumerate(rows):
        yield b"," + row.encoded if number else row.encoded
    yield tail


def _digest(pieces: Iterator[bytes] | Sequence[bytes], checkpoint: Checkpoint) -> str:
    hashed = sha256()
    for piece in pieces:
        hashed.update(piece)
        checkpoint()
    return hashed.hexdigest()


def _event(
    authority: Authority, kind: str, form: str, body: bytes, digest_text: str, reason: str
) -> bytes:
    name = "frame_digest" if form == "external_snapshot_frame" else "payload_digest"
    fields = {
        "id": str(uuid4()),
        "kind": kind,
        "engine": authority.owner,
        "task_id": "",
        "occurred_at": datetime.now(UTC).isoformat(),
        "data": {form: None, name: digest_text, "reason": reason},
    }
    head, marker, tail = canonical_plain(fields).partition(f'"{form}":'.encode())
    return head + marker + body + tail.removeprefix(b"null")
