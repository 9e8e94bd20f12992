"""Operators' changes to a scheduler's schedules, and the projections that confirm the changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from z4j_core.errors import ConflictError, NotFoundError
from z4j_core.redaction.markers import REDACTED
from z4j_core.schedule_external import (
    EXTERNAL_SCHEDULE_MUTATION_CAPABILITY,
    external_schedule_configuration,
)

from z4j_bare.errors import CommandError
from z4j_bare.schedules.projection import Row, digest, make_row
from z4j_bare.wire.canonical import canonical_plain

if TYPE_CHECKING:
    from z4j_bare.schedules.stream import Remaining, Stream

#: The operations of ``schedule.external.mutate``.
OPERATIONS = ("create", "update", "delete", "trigger")

#: Fields that the scheduler updates at each run.
#: In a confirmation, these fields have the values from the command.
_RUN_FIELDS = ("last_run_at", "total_runs")


def control(stream: Stream, parameters: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Enable or disable one schedule and confirm the change; return the command's result.

    Raises ``CommandError`` if the command is for another epoch or sequence number of the stream, if
    the schedule has changed since the command was sent, or if the scheduler rejects the change.
    """
    operation, key = _text(parameters, "operation_id"), _text(parameters, "source_key")
    desired = _desired(parameters)
    with stream.operation(parameters, seconds) as remaining:
        if parameters.get("expected_accepted_sequence") != stream.sequence:
            raise CommandError(
                f"{stream.name} was published again after the command was sent; try again"
            )
        row = _require_row(stream, key, remaining)
        if _settings(row.fields) != _settings(desired):
            raise CommandError(f"schedule {key} was changed after the command was sent")
        if row.fields["is_enabled"] != desired["is_enabled"]:
            _set_enabled(stream, key, desired["is_enabled"], remaining)
            row = _require_row(stream, key, remaining)
        if row.fields["is_enabled"] != desired["is_enabled"] or _settings(row.fields) != _settings(
            desired
        ):
            raise CommandError(
                f"schedule {key} is not in the requested state after the change", indeterminate=True
            )
        fields = {**row.fields, **{name: desired[name] for name in _RUN_FIELDS}}
        sequence = stream.confirm(Row(row.source, fields, canonical_plain(fields)), operation)
        return {
            "operation_id": operation,
            "sequence": sequence,
            "projection_buffered": True,
            "deduplicated": False,
        }


def mutate(stream: Stream, parameters: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Create, change, delete or trigger a schedule, and publish the stream; return the result.

    Raises ``CommandError`` and any exception of the adapter. If the scheduler made the change and
    publishing fails, the ``CommandError`` is marked as indeterminate.
    """
    operation, identity = _text(parameters, "operation"), _text(parameters, "operation_id")
    if operation not in OPERATIONS:
        raise CommandError(f"{operation} is not an operation on schedules")
    with stream.operation(parameters, seconds) as remaining:
        apply = _trigger if operation == "trigger" else _change
        key, extra = apply(stream, operation, parameters, remaining)
        try:
            published = stream.publish(f"native-mutation:{identity}", remaining)
        except Exception as error:
            raise CommandError(
                f"{operation} is done, but the schedules could not be published: {error}",
                indeterminate=True,
            ) from error
    row = published.rows.get(key)
    observed = None if row is None else external_schedule_configuration(row.fields)
    return {
        **published.facts,
        "operation_id": identity,
        "source_key": key,
        "observed_configuration": observed,
        **extra,
    }


def _trigger(
    stream: Stream, operation: str, parameters: Mapping[str, Any], remaining: Remaining
) -> tuple[str, dict[str, Any]]:
    del operation
    key = _text(parameters, "schedule_id")
    _require(stream, "trigger_now")
    _require_unchanged(stream, key, parameters.get("expected"), remaining)
    result = stream.host.invoke("trigger_now", stream.adapter_key(key), timeout=remaining())
    _require_success(stream, result)
    return key, {"trigger_result": {"status": "success"}}


def _change(
    stream: Stream, operation: str, parameters: Mapping[str, Any], remaining: Remaining
) -> tuple[str, dict[str, Any]]:
    _require(stream, EXTERNAL_SCHEDULE_MUTATION_CAPABILITY)
    definition = parameters.get("definition") or {}
    if not isinstance(definition, dict):
        raise CommandError("definition must be an object")
    if REDACTED.encode() in canonical_plain(definition):
        raise CommandError(
            f"the definition contains {REDACTED}, which would replace a value unknown to the brain"
        )
    key = None if operation == "create" else _text(parameters, "schedule_id")
    expected = (
        None
        if key is None
        else _require_unchanged(stream, key, parameters.get("expected"), remaining)
    )
    try:
        changed = stream.host.invoke(
            "apply_external_mutation",
            timeout=remaining(),
            operation=operation,
            schedule_id=None if key is None else stream.adapter_key(key),
            expected=expected,
            definition=definition,
        )
    except (ConflictError, NotFoundError, ValueError) as error:
        raise CommandError(f"{stream.name} refuses: {error}") from error
    return key or make_row(changed, stream.name, stream.host.redactor).key, {}


def _require_unchanged(
    stream: Stream, key: str, expected: Any, remaining: Remaining
) -> dict[str, Any]:
    """Return the adapter's unredacted schedule.

    Raises ``CommandError`` if the configuration of the schedule differs from ``expected``.
    """
    row = _require_row(stream, key, remaining)
    current = external_schedule_configuration(row.fields)
    if not isinstance(expected, dict) or external_schedule_configuration(expected) != current:
        raise CommandError(f"schedule {key} was changed after the command was sent")
    return row.source


def _desired(parameters: Mapping[str, Any]) -> dict[str, Any]:
    desired = parameters.get("desired_projection")
    if not isinstance(desired, dict) or digest(desired) != parameters.get(
        "desired_projection_digest"
    ):
        raise CommandError("desired_projection does not match desired_projection_digest")
    if not isinstance(desired.get("is_enabled"), bool) or desired.get(
        "source_key"
    ) != parameters.get("source_key"):
        raise CommandError("desired_projection belongs to another schedule")
    return desired


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a schedule without ``is_enabled``."""
    return {
        name: value
        for name, value in external_schedule_configuration(dict(fields)).items()
        if name != "is_enabled"
    }


def _set_enabled(stream: Stream, key: str, enabled: bool, remaining: Remaining) -> None:
    method = "enable_schedule" if enabled else "disable_schedule"
    _require_success(
        stream, stream.host.invoke(method, stream.adapter_key(key), timeout=remaining())
    )


def _require_success(stream: Stream, outcome: object) -> None:
    if getattr(outcome, "status", None) != "success":
        result = getattr(outcome, "result", None) or {}
        error = getattr(outcome, "error", None) or "no reason given"
        raise CommandError(
            f"{stream.name} refuses: {error}", indeterminate=result.get("indeterminate") is True
        )


def _require_row(stream: Stream, key: str, remaining: Remaining) -> Row:
    row = stream.row(key, remaining)
    if row is None:
        raise CommandError(f"{stream.name} has no schedule {key}")
    return row


def _require(stream: Stream, capability: str) -> None:
    if capability not in stream.host.capabilities():
        raise CommandError(f"scheduler {stream.name} does not support {capability}")


def _text(parameters: Mapping[str, Any], name: str) -> str:
    value = parameters.get(name)
    if not isinstance(value, str) or not value:
        raise CommandError(f"{name} is required")
    return value
