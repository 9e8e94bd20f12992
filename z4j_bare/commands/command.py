"""One operator's command, read with care: parameters are whatever somebody has sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from z4j_bare.errors import CommandError

#: Names of keyword arguments that adapters read as instructions of the agent's (``adapter-surface`` 2.13).
RESERVED = "__z4j_"


@dataclass(frozen=True, slots=True)
class Command:
    """A verified command.

    ``until`` is in monotonic seconds: the answer leaves by then, for soon after that the brain ignores it. All methods
    raise ``CommandError`` for a value that is not what it should be.
    """

    id: str
    action: str
    target: Mapping[str, Any]
    parameters: Mapping[str, Any]
    until: float
    token: str | None = None

    def text(self, *names: str) -> str | None:
        """Return the first of these that is a non-empty string, in the parameters and then in the target."""
        for source in (self.parameters, self.target):
            for name in names:
                if isinstance(source.get(name), str) and source[name]:
                    return str(source[name])
        return None

    def required(self, *names: str) -> str:
        """Like :meth:`text`, for one that has to be there."""
        found = self.text(*names)
        if found is None:
            raise self.error(f"{names[0]} is required")
        return found

    def option(self, name: str, kind: type | tuple[type, ...], what: str) -> Any:
        """Return a parameter of this type, or ``None``; a bool is no number."""
        value = self.parameters.get(name)
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise self.error(f"{name} must be {what}")
        return value

    def whole(self, name: str, default: int, *, most: int) -> int:
        """Return a whole number from 1; one above ``most`` becomes ``most``."""
        value = self.option(name, int, "a whole number")
        if value is not None and value < 1:
            raise self.error(f"{name} must be 1 or more")
        return min(most, default if value is None else value)

    def flag(self, name: str) -> bool:
        """Return a switch, off unless given."""
        return bool(self.option(name, bool, "true or false"))

    def arguments(
        self, args: str, kwargs: str
    ) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
        """Return a task's arguments by the names of their parameters, ``None`` where there are none."""
        positional, named = (
            self.option(args, list, "a list"),
            self.option(kwargs, dict, "an object"),
        )
        if any(not isinstance(name, str) or name.startswith(RESERVED) for name in named or ()):
            raise self.error(f"{kwargs}: names that begin with {RESERVED} are reserved")
        return None if positional is None else tuple(positional), None if named is None else dict(
            named
        )

    def eta(self, wall: float) -> float | None:
        """Return when a task shall run, in seconds since the epoch: ``eta``, or ``eta_seconds`` from ``wall``."""
        eta, delay = (
            self.option(name, (int, float), "a number of seconds")
            for name in ("eta", "eta_seconds")
        )
        if eta is not None:
            return float(eta)
        return None if delay is None else wall + float(delay)

    def error(self, text: str) -> CommandError:
        """Return the refusal of this command, to be raised."""
        return CommandError(f"{self.action}: {text}")
