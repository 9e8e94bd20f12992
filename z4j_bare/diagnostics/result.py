"""What a probe found out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, WARN, SKIP, FAIL = "OK", "WARN", "SKIP", "FAIL"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One line of a doctor's report.

    ``message`` begins with ``OK:``, ``WARN:``, ``SKIP:`` or ``FAIL:``; only the last is not ``ok``. ``details`` are plain
    JSON; where something is wrong, ``cause`` and ``fix`` are among them.
    """

    name: str
    ok: bool
    message: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``OK``, ``WARN``, ``SKIP`` or ``FAIL``."""
        return self.message.partition(":")[0]

    @property
    def text(self) -> str:
        """What was found, without verdict and fix."""
        return str(self.details.get("cause") or self.message.partition(": ")[2])

    @property
    def fix(self) -> str:
        """What to do about it; empty where there is nothing."""
        return str(self.details.get("fix", ""))


def passed(name: str, text: str, **details: Any) -> ProbeResult:
    """Return a good result."""
    return ProbeResult(name, ok=True, message=f"{OK}: {text}", details=details)


def skipped(name: str, why: str, **details: Any) -> ProbeResult:
    """Return the result of a probe that was not made."""
    return ProbeResult(name, ok=True, message=f"{SKIP}: {why}", details=details)


def warned(name: str, cause: str, fix: str, **details: Any) -> ProbeResult:
    """Return the result for what works, but will not go on for ever, or not as well as it could."""
    return ProbeResult(
        name,
        ok=True,
        message=f"{WARN}: {cause}: {fix}",
        details={**details, "cause": cause, "fix": fix},
    )


def failed(name: str, cause: str, fix: str, **details: Any) -> ProbeResult:
    """Return a bad result: what is wrong, and what to do about it."""
    return ProbeResult(
        name,
        ok=False,
        message=f"{FAIL}: {cause}: {fix}",
        details={**details, "cause": cause, "fix": fix},
    )
