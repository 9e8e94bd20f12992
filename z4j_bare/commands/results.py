"""What is sent back: redacted, of bounded size, and sent whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from z4j_bare.wire.canonical import plain
from z4j_bare.wire.frames import command_result, shortened

if TYPE_CHECKING:
    from z4j_bare.commands.command import Command

Offload = Callable[..., tuple[bool, Any]]

#: Values in a result; beyond, nobody would read it, and making it plain would hold the hub.
MAX_NODES = 50_000


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended."""

    status: str
    result: dict[str, Any] | None
    error: str | None
    #: What has to be done after the answer is stored.
    then: Callable[[], object] | None = None

    @classmethod
    def of(cls, outcome: Any) -> Answer:
        """Read an adapter's ``CommandResult``, or whatever it has returned in place of one."""
        status = getattr(outcome, "status", None)
        result, error = getattr(outcome, "result", None), getattr(outcome, "error", None)
        if status not in ("success", "failed") or not isinstance(result, dict | None):
            return cls(
                "failed",
                None,
                f"the adapter returned {type(outcome).__name__} for a result: outcome unknown",
            )
        return cls(
            status, result, None if error is None else str(error), getattr(outcome, "then", None)
        )


def indeterminate(command: Command, error: str) -> Answer:
    """Return the answer for what may have happened or not."""
    return Answer("failed", {"indeterminate": True, "operation": command.action}, error)


def encoded(
    command: Command,
    answer: Answer,
    redactor: Any = None,
    offload: Offload = lambda call, *args: (True, call(*args)),
) -> bytes:
    """Return the payload of a ``command_result``.

    :param redactor: hides what must not leave the host, as in events: the brain redacts no results.
    :param offload: runs the redaction, which takes 0.1 s for a large result, off the hub.
    """
    result = answer.result
    try:
        if _too_many(result, MAX_NODES):
            result = shortened(result, f"of more than {MAX_NODES} values")
        # Foreign objects become text here: off the hub their code must not run.
        body = plain(result)
        ok, payload = offload(_encode, command, answer, body, redactor)
        if ok:
            return bytes(payload)
        raise payload
    except Exception as error:
        why = f"not to be encoded ({type(error).__name__})"
        lost = None if answer.error is None else f"{command.action} failed, and the reason is {why}"
        return command_result(answer.status, shortened(None, why), lost, command.token)


def _encode(command: Command, answer: Answer, body: Any, redactor: Any) -> bytes:
    error = answer.error
    if redactor is not None:
        body = redactor.scrub(body)
        if error is not None:
            # By line: one address in a traceback must not cost the whole of it.
            error = "\n".join(redactor.scrub(line) for line in error.split("\n"))
    return command_result(answer.status, body, error, command.token)


def _too_many(value: Any, most: int) -> bool:
    waiting, seen = [value], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > most:
            return True
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            waiting.extend(value)
    return False
