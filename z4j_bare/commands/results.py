"""Redacts and encodes command results, and limits their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from z4j_bare.wire.canonical import to_json_types
from z4j_bare.wire.frames import command_result, summarise_result

if TYPE_CHECKING:
    from z4j_bare.events.redaction import Redactor
    from z4j_bare.wire.command import Command, CommandOutcome

Offload = Callable[..., tuple[bool, Any]]

#: Maximum number of values in a result. The conversion of more values would block the hub.
MAX_NODES = 50_000


def encode_result(
    command: Command,
    outcome: CommandOutcome,
    redactor: Redactor | None = None,
    offload: Offload = lambda call, *args: (True, call(*args)),
) -> bytes:
    """Return the payload of a ``command_result`` frame.

    :param redactor: applied to result and error, because the brain does not redact results.
    :param offload: calls a function outside the hub, because the redaction of a large result takes
        0.1 s.
    """
    result = outcome.result
    try:
        if _has_more_nodes(result, MAX_NODES):
            result = summarise_result(result, f"of more than {MAX_NODES} values")
        # Convert foreign objects before the offload, because their code must not run in the native
        # thread.
        body = to_json_types(result)
        ok, payload = offload(_encode, command, outcome, body, redactor)
        if ok:
            return bytes(payload)
        raise payload
    except Exception as error:
        why = f"not encodable ({type(error).__name__})"
        text = None
        if outcome.error is not None:
            text = f"{command.action} failed, and the error text is {why}"
        return command_result(outcome.status, summarise_result(None, why), text, command.token)


def _encode(
    command: Command,
    outcome: CommandOutcome,
    body: dict[str, Any] | None,
    redactor: Redactor | None,
) -> bytes:
    error = outcome.error
    if redactor is not None:
        body = redactor.scrub(body)
        if error is not None:
            # Redact each line separately, so that an email address does not hide a whole traceback.
            error = "\n".join(redactor.scrub(line) for line in error.split("\n"))
    return command_result(outcome.status, body, error, command.token)


def _has_more_nodes(value: object, maximum: int) -> bool:
    stack, visited = [value], 0
    while stack:
        value = stack.pop()
        visited += 1
        if visited > maximum:
            return True
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            stack.extend(value)
    return False
