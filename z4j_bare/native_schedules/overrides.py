"""The rows of a schedule file. Each row contains an operator's changes to one schedule.

A row has one of the three layouts of z4j 1.13, as JSON text:

- ``{"patch": {...}}`` changes some fields of a schedule that is defined in code,
- ``{"created": {...}, "patch": {...}}`` is a schedule that is not defined in code,
- ``{"deleted": true}`` hides a schedule that is defined in code.

Earlier releases of this package stored the whole schedule, or ``null`` for a deleted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from z4j_core.models import Schedule
from z4j_core.schedule_external import canonical_external_json

#: Fields of a schedule that an operator can change.
EDITABLE = frozenset(
    {"name", "task_name", "kind", "expression", "timezone", "queue", "args", "kwargs", "is_enabled"}
)

#: Maximum length of ``Schedule.source``, in characters.
_MAX_SOURCE = 64

#: A schedule or a part of it, as JSON values.
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Override:
    """An operator's changes to one schedule.

    :param patch: new values of fields in :data:`EDITABLE`.
    :param created: the fields of a schedule that is not defined in code.
    :param deleted: whether the schedule is deleted.
    :param ignored: names in the row's patch that this version does not support.
    :param migrate: whether the row has the layout of an earlier release of this package.
    """

    patch: Fields = field(default_factory=dict)
    created: Fields | None = None
    deleted: bool = False
    ignored: tuple[str, ...] = ()
    migrate: bool = False

    def is_effective(self, base: Schedule | None) -> bool:
        """Return whether the schedule exists: it is not deleted, and is created or in code."""
        return not self.deleted and (base is not None or self.created is not None)

    def apply(self, base: Schedule | None, key: str, owner: str) -> Schedule:
        """Return the changed schedule.

        :param base: the schedule in code that has this key, if any.
        :raises ValueError: the changed schedule is invalid.
        """
        if base is not None:
            fields = base.model_dump(mode="json")
        else:
            created, known = self.created or {}, Schedule.model_fields
            fields = {name: value for name, value in created.items() if name in known}
            fields |= {"external_id": key, "scheduler": owner}
        patch = canonical_external_json(self.patch)
        fields |= {
            **self.patch,
            "source": f"{owner}:override"[:_MAX_SOURCE],
            "source_hash": sha256(patch).hexdigest(),
        }
        return Schedule.model_validate_json(json.dumps(fields))

    def encode(self) -> str:
        """Return the row's text."""
        row: Fields = {"deleted": True} if self.deleted else {"patch": self.patch}
        if self.created is not None:
            row["created"] = self.created
        return canonical_external_json(row).decode()


def key_of(schedule: Schedule) -> str:
    """Return the key of a schedule. The brain uses the same key."""
    return schedule.external_id or schedule.name


def decode(body: bytes, key: str, base: Schedule | None, owner: str) -> Override:
    """Return the override in a row.

    :param base: the schedule in code that has this key, if any.
    :raises ValueError: the row has none of the layouts.
    """
    row = json.loads(body.decode())
    if row is None:
        return Override(deleted=True, migrate=True)
    if not isinstance(row, dict):
        raise ValueError("the row is not a JSON object")  # noqa: TRY004 - one error for bad rows
    if row.get("deleted"):
        return Override(deleted=True)
    created, patch = row.get("created") or None, row.get("patch", {})
    if "created" in row or "patch" in row:
        if not isinstance(patch, dict) or not isinstance(created, dict | None):
            raise ValueError("created or patch is not a JSON object")
        return Override(
            patch={name: value for name, value in patch.items() if name in EDITABLE},
            created=created,
            ignored=tuple(sorted(patch.keys() - EDITABLE)),
        )
    if {"id", "task_name"} <= row.keys():
        return _decode_whole(row, key, base, owner)
    raise ValueError("the row contains neither deleted, created nor patch")


def changes(base: Mapping[str, Any], changed: Mapping[str, Any]) -> Fields:
    """Return the editable fields of ``changed`` whose values differ from those of ``base``."""
    return {
        name: changed[name]
        for name in sorted(EDITABLE & changed.keys())
        if name not in base or not _same(base[name], changed[name])
    }


def _decode_whole(row: Fields, key: str, base: Schedule | None, owner: str) -> Override:
    """Return the override in a row that contains the whole schedule.

    The row does not contain the schedule that the operator saw. Therefore a field counts as changed
    if it differs from the current code.
    """
    if base is not None:
        return Override(patch=changes(base.model_dump(mode="json"), row), migrate=True)
    if key.startswith(f"{owner}:z4j:"):
        return Override(created=row, migrate=True)
    return Override(patch=changes({}, row), migrate=True)


def _same(one: object, other: object) -> bool:
    """Compare JSON values. ``==`` would not distinguish ``1`` and ``true``."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
