"""What an operator changes in a scheduler that keeps its own schedules, and how the brain is told what came of it."""

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
from z4j_bare.schedules.projection import Row, digest_of, row_of
from z4j_bare.wire.canonical import canonical_plain

if TYPE_CHECKING:
    from z4j_bare.schedules.stream import Left, Stream

OPERATIONS = ("create", "update", "delete", "trigger")

#: What the scheduler itself goes on changing; the brain takes its own figures of them for what was asked.
_LIVE = ("last_run_at", "total_runs")


def control(stream: Stream, parameters: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Switch one schedule on or off and confirm it; return the command's result.

    Raises ``CommandError`` for an order that is not for our stream, comes too late, or is refused by the scheduler.
    """
    operation, key = _text(parameters, "operation_id"), _text(parameters, "source_key")
    desired = _desired(parameters)
    with stream.order(parameters, seconds) as left:
        if parameters.get("expected_accepted_sequence") != stream.sequence:
            raise CommandError(
                f"{stream.name} has been told anew since the order was given; try again"
            )
        row = _known(stream, key, left)
        if _settings(row.fields) != _settings(desired):
            raise CommandError(f"schedule {key} was changed since the order was given")
        if row.fields["is_enabled"] != desired["is_enabled"]:
            _switch(stream, key, desired["is_enabled"], left)
            row = _known(stream, key, left)
        if row.fields["is_enabled"] != desired["is_enabled"] or _settings(row.fields) != _settings(
            desired
        ):
            raise CommandError(
                f"schedule {key} is not as it should be after that", indeterminate=True
            )
        fields = {**row.fields, **{name: desired[name] for name in _LIVE}}
        sequence = stream.confirm(Row(row.source, fields, canonical_plain(fields)), operation)
        return {
            "operation_id": operation,
            "sequence": sequence,
            "projection_buffered": True,
            "deduplicated": False,
        }


def mutate(stream: Stream, parameters: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Create, change, delete or trigger a schedule, and tell all of them anew; return the command's result.

    Raises ``CommandError``, or what the adapter raises; an error after the scheduler has agreed is indeterminate.
    """
    operation, identity = _text(parameters, "operation"), _text(parameters, "operation_id")
    if operation not in OPERATIONS:
        raise CommandError(f"{operation} is no operation on schedules")
    with stream.order(parameters, seconds) as left:
        act = _trigger if operation == "trigger" else _change
        key, extra = act(stream, operation, parameters, left)
        try:
            told = stream.tell(f"native-mutation:{identity}", left)
        except Exception as error:
            raise CommandError(
                f"done, but the schedules could not be told anew: {error}", indeterminate=True
            ) from error
    row = told.rows.get(key)
    observed = None if row is None else external_schedule_configuration(row.fields)
    return {
        **told.facts,
        "operation_id": identity,
        "source_key": key,
        "observed_configuration": observed,
        **extra,
    }


def _trigger(
    stream: Stream, operation: str, parameters: Mapping[str, Any], left: Left
) -> tuple[str, dict[str, Any]]:
    del operation
    key = _text(parameters, "schedule_id")
    _require(stream, "trigger_now")
    _unchanged(stream, key, parameters.get("expected"), left)
    result = stream.host.invoke("trigger_now", stream.native(key), timeout=left())
    _succeeded(stream, result)
    return key, {"trigger_result": {"status": "success"}}


def _change(
    stream: Stream, operation: str, parameters: Mapping[str, Any], left: Left
) -> tuple[str, dict[str, Any]]:
    _require(stream, EXTERNAL_SCHEDULE_MUTATION_CAPABILITY)
    definition = parameters.get("definition") or {}
    if not isinstance(definition, dict):
        raise CommandError("definition must be an object")
    if REDACTED.encode() in canonical_plain(definition):
        raise CommandError(
            f"{REDACTED} stands for what the brain never had: it would replace the real value"
        )
    key = None if operation == "create" else _text(parameters, "schedule_id")
    expected = None if key is None else _unchanged(stream, key, parameters.get("expected"), left)
    try:
        made = stream.host.invoke(
            "apply_external_mutation",
            timeout=left(),
            operation=operation,
            schedule_id=None if key is None else stream.native(key),
            expected=expected,
            definition=definition,
        )
    except (ConflictError, NotFoundError, ValueError) as error:
        raise CommandError(f"{stream.name} refuses: {error}") from error
    return key or row_of(made, stream.name, stream.host.redactor).key, {}


def _unchanged(stream: Stream, key: str, expected: Any, left: Left) -> dict[str, Any]:
    """Return the schedule as the adapter has it, which knows what the brain must not, if it is what the brain expects."""
    row = _known(stream, key, left)
    present = external_schedule_configuration(row.fields)
    if not isinstance(expected, dict) or external_schedule_configuration(expected) != present:
        raise CommandError(f"schedule {key} was changed since the order was given")
    return row.source


def _desired(parameters: Mapping[str, Any]) -> dict[str, Any]:
    desired = parameters.get("desired_projection")
    if not isinstance(desired, dict) or digest_of(desired) != parameters.get(
        "desired_projection_digest"
    ):
        raise CommandError("desired_projection does not have the digest that came with it")
    if not isinstance(desired.get("is_enabled"), bool) or desired.get(
        "source_key"
    ) != parameters.get("source_key"):
        raise CommandError("desired_projection is of another schedule")
    return desired


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a schedule the one it is, on or off."""
    return {
        name: value
        for name, value in external_schedule_configuration(dict(fields)).items()
        if name != "is_enabled"
    }


def _switch(stream: Stream, key: str, on: bool, left: Left) -> None:
    method = "enable_schedule" if on else "disable_schedule"
    _succeeded(stream, stream.host.invoke(method, stream.native(key), timeout=left()))


def _succeeded(stream: Stream, outcome: Any) -> None:
    if getattr(outcome, "status", None) != "success":
        result = getattr(outcome, "result", None) or {}
        error = getattr(outcome, "error", None) or "no reason given"
        raise CommandError(
            f"{stream.name} refuses: {error}", indeterminate=result.get("indeterminate") is True
        )


def _known(stream: Stream, key: str, left: Left) -> Row:
    row = stream.row(key, left)
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
