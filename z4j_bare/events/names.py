"""Names that the brain's redaction would swallow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from z4j_core.redaction.engine import RedactionEngine


def safe_name(name: str, matches: Callable[[str], bool]) -> str:
    """Return a worker's name as the brain can keep it.

    ``celery@web-1.example.com`` looks like an email address and would become ``[REDACTED]`` (``brain-contract`` 5.9), with
    every other worker's; the dots of the host part become underscores. Any other name stays as it is.

    :param matches: whether a value would be redacted, such as ``RedactionEngine.value_matches``.
    """
    if not matches(name):
        return name
    node, _, host = name.partition("@")
    return f"{node}@{host.replace('.', '_')}"


def value_matcher(engine: Any) -> Callable[[str], bool]:
    """Return what :func:`safe_name` asks: the adapter's own patterns, or the default ones where it has none."""
    redaction = getattr(engine, "redaction", None)
    return (
        redaction.value_matches
        if isinstance(redaction, RedactionEngine)
        else RedactionEngine().value_matches
    )
