"""Redaction of snapshots: z4j_core's rules, asked through its public matchers, with the answers remembered."""

from __future__ import annotations

from typing import Any

from z4j_core.redaction.engine import RedactionEngine
from z4j_core.redaction.markers import REDACTED, truncation_suffix

from z4j_bare.events.match import ValueMatcher
from z4j_bare.events.snapshot import TruncatedStr

#: Answers remembered per kind of question; keys and short values repeat from task to task.
REMEMBERED = 4096
#: Longest string whose answer is remembered.
SHORT = 64


class Redactor:
    """Does what ``RedactionEngine.scrub`` does to plain JSON values, in a fraction of the time.

    A property test holds the two equal. A :class:`TruncatedStr` is judged by all the characters it still has, and cut after that.
    """

    def __init__(self, engine: RedactionEngine) -> None:
        self._key_matches = engine.key_matches
        self._value_matches = ValueMatcher(engine)
        self._max_bytes = engine.config.max_value_bytes
        self._keys: dict[str, bool] = {}
        self._values: dict[str, bool] = {}

    def scrub(self, value: Any) -> Any:
        """Return ``value`` with every match replaced by the marker, and long strings cut."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {
                self._text(key): self._hide(item) if self.secret(key) else self.scrub(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.scrub(item) for item in value]
        return value

    def _hide(self, value: Any) -> Any:
        """Return ``value`` with every scalar in it replaced: everything below a sensitive key is secret."""
        if isinstance(value, dict):
            return {self._text(key): self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list) else REDACTED

    def secret(self, key: str) -> bool:
        """Whether what stands under ``key`` has to be redacted."""
        found = self._keys.get(key)
        if found is None:
            found = self._remember(self._keys, key, self._key_matches(key))
        return found

    def _text(self, value: str) -> str:
        if len(value) <= SHORT:
            found = self._values.get(value)
            if found is None:
                found = self._remember(self._values, value, self._value_matches(value))
            return REDACTED if found else value
        if self._value_matches(value):
            return REDACTED
        if isinstance(value, TruncatedStr):
            head = (
                value[: value.limit]
                .encode(errors="replace")[: self._max_bytes]
                .decode(errors="ignore")
            )
            return f"{head}[... {value.length - len(head)} more characters cut]"
        return self._shorten(value) if len(value) * 4 > self._max_bytes else value

    def _shorten(self, value: str) -> str:
        raw = value.encode(errors="replace")
        if len(raw) <= self._max_bytes:
            return value
        return raw[: self._max_bytes].decode(errors="replace") + truncation_suffix(
            len(raw) - self._max_bytes
        )

    @staticmethod
    def _remember(memory: dict[str, bool], text: str, answer: bool) -> bool:
        if len(memory) >= REMEMBERED:
            memory.clear()
        memory[str(text)] = answer
        return answer
