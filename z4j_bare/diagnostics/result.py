"""Defines the result of a probe and its four verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, WARN, SKIP, FAIL = "OK", "WARN", "SKIP", "FAIL"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of a probe. Each result is one line in the report of ``z4j-bare doctor``.

    :param ok: false if the probe failed; true if the probe passed, warned or was skipped.
    :param message: verdict, cause and fix; begins with ``OK:``, ``WARN:``, ``SKIP:`` or ``FAIL:``.
    :param details: further values, of JSON types. The details of a warning or a failure contain
        ``cause`` and ``fix``.
    """

    name: str
    ok: bool
    message: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The start of the message: ``OK``, ``WARN``, ``SKIP`` or ``FAIL``."""
        return self.message.partition(":")[0]

    @property
    def text(self) -> str:
        """The message without verdict and fix."""
        return str(self.details.get("cause") or self.message.partition(": ")[2])

    @property
    def fix(self) -> str:
        """The action that the operator should take; empty if no action is needed."""
        return str(self.details.get("fix", ""))


def passed(name: str, text: str, **details: object) -> ProbeResult:
    """Return the result of a probe that succeeded."""
    return ProbeResult(name, ok=True, message=f"{OK}: {text}", details=details)


def skipped(name: str, reason: str, **details: object) -> ProbeResult:
    """Return the result of a probe that was not run."""
    return ProbeResult(name, ok=True, message=f"{SKIP}: {reason}", details=details)


def warned(name: str, cause: str, fix: str, **details: object) -> ProbeResult:
    """Return the result of a probe that succeeded but found a problem."""
    return ProbeResult(
        name,
        ok=True,
        message=f"{WARN}: {cause}: {fix}",
        details={**details, "cause": cause, "fix": fix},
    )


def failed(name: str, cause: str, fix: str, **details: object) -> ProbeResult:
    """Return the result of a probe that failed."""
    return ProbeResult(
        name,
        ok=False,
        message=f"{FAIL}: {cause}: {fix}",
        details={**details, "cause": cause, "fix": fix},
    )
