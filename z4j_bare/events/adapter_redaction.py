"""The operator's redaction settings, merged into an adapter's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_core.redaction.engine import RedactionConfig, RedactionEngine

if TYPE_CHECKING:
    from collections.abc import Iterable


def merge_redaction(engine: Any, config: Any) -> None:
    """Replace ``engine.redaction`` by one that also obeys ``config`` (a ``z4j_core`` ``Config``).

    Has to happen before ``connect_signals``, where the adapters capture the object. Leaves alone what is no
    ``RedactionEngine``. Raises ``RedactionConfigError`` for a bad pattern: nothing may be captured without
    it. EventSource: ``adapter-surface`` 2.13.
    """
    present = getattr(engine, "redaction", None)
    if isinstance(present, RedactionEngine):
        engine.redaction = RedactionEngine(_merged(present.config, config))


def _merged(own: RedactionConfig, config: Any) -> RedactionConfig:
    return RedactionConfig(
        extra_key_patterns=_union(own.extra_key_patterns, config.redaction_extra_key_patterns),
        extra_value_patterns=_union(
            own.extra_value_patterns, config.redaction_extra_value_patterns
        ),
        default_patterns_enabled=own.default_patterns_enabled and config.redaction_defaults_enabled,
        max_value_bytes=_limit(own.max_value_bytes, config.max_payload_bytes),
    )


def _union(own: Iterable[str], operator: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*own, *operator)))


def _limit(own: int, operator: int) -> int:
    """Return the operator's limit in bytes, or the adapter's if somebody chose a smaller one for it."""
    return operator if own == RedactionConfig.max_value_bytes else min(own, operator)
