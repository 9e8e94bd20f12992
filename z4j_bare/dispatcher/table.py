"""The command table: one small function per action, from the frame's parameters to the adapter's call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import AgentError

if TYPE_CHECKING:
    from z4j_bare.adapters.engines import EngineHost


class RefusedError(AgentError):
    """The command cannot be carried out as it stands; the text is the operator's answer."""


@dataclass(frozen=True, slots=True)
class Command:
    """A verified command.

    ``deadline`` is monotonic seconds: after it the brain ignores the answer.
    """

    id: str
    action: str
    target: Mapping[str, Any]
    parameters: Mapping[str, Any]
    deadline: float
    token: str | None = None

    def text(self, *names: str) -> str | None:
        """Return the first of these that is a non-empty string, in the parameters and then in the target."""
        for source in (self.parameters, self.target):
            for name in names:
                if isinstance(source.get(name), str) and source[name]:
                    return str(source[name])
        return None

    def required(self, *names: str) -> str:
        """Like :meth:`text`. Raises ``RefusedError`` when there is none."""
        found = self.text(*names)
        if found is None:
            raise RefusedError(f"{self.action}: {names[0]} is required")
        return found


Call = Callable[[Command, "EngineHost", float], Any]


def submit_task(command: Command, host: EngineHost, seconds: float) -> Any:
    """Enqueue a task by name."""
    given = command.parameters
    return host.invoke(
        "submit_task",
        command.required("name", "task_name"),
        timeout=seconds,
        args=tuple(given.get("args") or ()),
        kwargs=dict(given.get("kwargs") or {}),
        queue=given.get("queue"),
        eta=given.get("eta"),
        priority=given.get("priority"),
    )


def retry_task(command: Command, host: EngineHost, seconds: float) -> Any:
    """Run a task again. Only the operator's overrides are used: the brain's own copy of the arguments is redacted."""
    given = command.parameters
    if (given.get("override_args") is None) != (given.get("override_kwargs") is None):
        raise RefusedError("retry_task: override_args and override_kwargs come together or not at all")
    return host.invoke(
        "retry_task",
        command.required("task_id", "id"),
        timeout=seconds,
        task_name=given.get("task_name"),
        override_args=given.get("override_args"),
        override_kwargs=given.get("override_kwargs"),
        eta=given.get("eta"),
        priority=given.get("priority"),
    )


def cancel_task(command: Command, host: EngineHost, seconds: float) -> Any:
    """Revoke a task, ending it if it runs."""
    return host.invoke("cancel_task", command.required("task_id", "id"), timeout=seconds)


ENGINE_ACTIONS: Mapping[str, Call] = {
    "submit_task": submit_task,
    "retry_task": retry_task,
    "cancel_task": cancel_task,
}
