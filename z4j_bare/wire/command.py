"""An operator's command, and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from z4j_bare.errors import CommandError

#: Prefix of keyword arguments that adapters interpret as instructions from the agent.
RESERVED_PREFIX = "__z4j_"


@dataclass(frozen=True, slots=True)
class Command:
    """A command whose signature is verified. The methods check the command's parameters.

    ``deadline`` is in monotonic seconds. The brain ignores a result that arrives after the
    deadline. The methods raise ``CommandError`` for a parameter of the wrong type or value.
    """

    id: str
    action: str
    target: Mapping[str, Any]
    parameters: Mapping[str, Any]
    deadline: float
    token: str | None = None

    def text(self, *names: str) -> str | None:
        """Return the first non-empty string with one of these names in parameters or target."""
        for source in (self.parameters, self.target):
            for name in names:
                if isinstance(source.get(name), str) and source[name]:
                    return str(source[name])
        return None

    def required(self, *names: str) -> str:
        """Do the same as :meth:`text`, but raise ``CommandError`` instead of returning ``None``."""
        found = self.text(*names)
        if found is None:
            raise self.error(f"{names[0]} is required")
        return found

    def option(self, name: str, kind: type | tuple[type, ...], description: str) -> Any:
        """Return the parameter ``name``, which must be of type ``kind``; ``None`` if absent.

        A bool is not accepted as a number.
        """
        value = self.parameters.get(name)
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise self.error(f"{name} must be {description}")
        return value

    def positive_int(self, name: str, default: int, *, maximum: int) -> int:
        """Return an integer parameter of 1 or more, reduced to at most ``maximum``."""
        value = self.option(name, int, "a whole number")
        if value is not None and value < 1:
            raise self.error(f"{name} must be 1 or more")
        return min(maximum, default if value is None else value)

    def flag(self, name: str) -> bool:
        """Return a boolean parameter, by default ``False``."""
        return bool(self.option(name, bool, "true or false"))

    def arguments(
        self, args: str, kwargs: str
    ) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
        """Return the positional and keyword arguments of a task; ``None`` for absent parameters.

        :param args: name of the parameter with the positional arguments.

        :param kwargs: name of the parameter with the keyword arguments.
        """
        positional = self.option(args, list, "a list")
        named = self.option(kwargs, dict, "an object")
        if any(not isinstance(key, str) or key.startswith(RESERVED_PREFIX) for key in named or ()):
            raise self.error(f"{kwargs}: names that begin with {RESERVED_PREFIX} are reserved")
        return (
            None if positional is None else tuple(positional),
            None if named is None else dict(named),
        )

    def eta(self, wall: float) -> float | None:
        """Return the time at which a task should run, in seconds since the epoch.

        The time is the parameter ``eta``, or ``wall`` plus the parameter ``eta_seconds``. Without
        both parameters, the time is ``None``.
        """
        eta, delay = (
            self.option(name, (int, float), "a number of seconds")
            for name in ("eta", "eta_seconds")
        )
        if eta is not None:
            return float(eta)
        return None if delay is None else wall + float(delay)

    def error(self, text: str) -> CommandError:
        """Return a ``CommandError`` that names the action."""
        return CommandError(f"{self.action}: {text}")


@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """The outcome of a command; ``status`` is ``success`` or ``failed``."""

    status: str
    result: dict[str, Any] | None = None
    error: str | None = None
    #: An action to perform after the result has been stored, such as a restart of the process.
    after_stored: Callable[[], object] | None = None

    @classmethod
    def success(
        cls, result: dict[str, Any], after_stored: Callable[[], object] | None = None
    ) -> Self:
        """Return the outcome of a command that was carried out."""
        return cls("success", result, None, after_stored)

    @classmethod
    def failed(cls, error: str) -> Self:
        """Return the outcome of a command that was not carried out."""
        return cls("failed", None, error)

    @classmethod
    def indeterminate(cls, action: str, error: str) -> Self:
        """Return the outcome of a command that may have been carried out."""
        return cls("failed", {"indeterminate": True, "operation": action}, error)

    @classmethod
    def from_adapter(cls, returned: object) -> Self:
        """Convert an adapter's ``CommandResult``. For any other object the outcome is unknown."""
        if isinstance(returned, cls):
            return returned
        status = getattr(returned, "status", None)
        result, error = getattr(returned, "result", None), getattr(returned, "error", None)
        if status not in ("success", "failed") or not isinstance(result, dict | None):
            kind = type(returned).__name__
            text = f"the adapter returned {kind} for a result: outcome unknown"
            return cls("failed", {"indeterminate": True}, text)
        return cls(status, result, None if error is None else str(error))
