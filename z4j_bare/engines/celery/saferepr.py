"""Parses arguments and results from the ``saferepr`` text in a worker's events.

Celery writes the values in Python's notation, limits their length and depth, and escapes only
quotes. Redaction selects values by their keys. Therefore this module recovers the structure. Text
that cannot be parsed remains text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite, nan
from typing import Any

from z4j_core.redaction.markers import REDACTED

from z4j_bare.events.snapshot import MARGIN, MAX_DEPTH, MAX_NODES, snapshot

#: Maximum characters parsed of one text. Celery's default limit is 1,024.
MAX_TEXT = 8 * 1024

#: Maximum number of brackets, commas and colons that are examined in text that cannot be parsed.
#: After this number, the rest of the text becomes part of the current value.
MAX_STEPS = 2000

#: Replaces the values that Celery or a limit of this module left out.
CUT = "[... cut]"

_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)
_PLAIN = re.compile(r"[-+.\w]+")
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}\Z")
_FLOAT = re.compile(r"[-+]?[0-9]{1,300}(?:\.[0-9]{0,300})?(?:[eE][-+]?[0-9]{1,4})?\Z")
_UNSTRUCTURED = re.compile(r"[^()<>\[\]{},:]+")
_WORD = re.compile(r"[A-Za-z_][\w-]*")
_CONSTANTS = {"None": None, "True": True, "False": False, "...": CUT}
_OPEN, _CLOSE = "([{", ")]}"


class ReprText(str):
    """Text in ``saferepr`` notation, at most ``MAX_TEXT`` characters."""

    __slots__ = ()


def bound(value: object) -> Any:
    """Return a bounded copy of an argument or result: text for :func:`parse`, or a snapshot."""
    return ReprText(value[:MAX_TEXT]) if isinstance(value, str) else snapshot(value)


def parse(text: str, is_sensitive_key: Callable[[str], bool]) -> Any:
    """Return the value that ``text`` describes, in JSON types.

    Does not raise. Parsing 1,000 characters of short key-value pairs takes 0.3 ms. Tuples and sets
    become lists. Bytes become the text ``<builtins.bytes>``. The text of any other object is
    opaque: it is not parsed.

    :param is_sensitive_key: returns whether the value of a key must be redacted. If opaque text
        contains such a key, all opaque text is redacted, because the end of the key's value is
        unknown.
    """
    try:
        return _Parser(text, is_sensitive_key).document()
    except _SensitiveError:
        return _Parser(text, is_sensitive_key, redact_opaque=True).document()


class _SensitiveError(Exception):
    """Opaque text contains a sensitive key."""


class _Parser:
    """Parses one text. Every method moves ``position`` past the characters that it has read."""

    def __init__(
        self, text: str, is_sensitive_key: Callable[[str], bool], *, redact_opaque: bool = False
    ) -> None:
        self.text = text[:MAX_TEXT]
        self.position = 0
        self.nodes = MAX_NODES
        self.steps = MAX_STEPS
        self.is_sensitive_key = is_sensitive_key
        self.redact_opaque = redact_opaque
        self.sensitive_words: set[str] | None = None

    def document(self) -> Any:
        """Parse the whole text."""
        value = self.value("", MAX_DEPTH)
        return value if self.peek() == "" else self.opaque(0, "")

    def peek(self) -> str:
        """Skip spaces and return the next character without reading it; empty at the end."""
        found = self.text[self.position : self.position + 1]
        while found in {" ", "\n"}:
            self.position += 1
            found = self.text[self.position : self.position + 1]
        return found

    def value(self, ends: str, depth: int) -> Any:
        """Read a value, which must be followed by one of the characters ``ends`` or by the end."""
        self.nodes -= 1
        first = self.peek()
        start = self.position
        value = self.literal(first, depth) if self.nodes > 0 else _FAILED
        following = self.peek()
        # If a string ends with a backslash, the closing quote seems escaped, and the string extends
        # into the next key. Then an unexpected character follows.
        if value is _FAILED or (following and following not in ends):
            return self.opaque(start, ends)
        return value

    def literal(self, first: str, depth: int) -> Any:
        """Read a container, string, bytes, number or constant; else return ``_FAILED``."""
        if first and first in _OPEN:
            return self.container(first, depth - 1) if depth else _FAILED
        if first == "'":
            return self.string()
        if self.text.startswith("b'", self.position):
            self.position += 1
            return _FAILED if self.string() is _FAILED else "<builtins.bytes>"
        found = _PLAIN.match(self.text, self.position)
        if found is None:
            return _FAILED
        self.position = found.end()
        return _number_or_constant(found.group())

    def string(self) -> Any:
        found = _STRING.match(self.text, self.position)
        if found is None:
            return _FAILED
        self.position = found.end()
        return found.group(1).replace("\\'", "'")

    def container(self, opening: str, depth: int) -> Any:
        """Read a container. If its closing bracket is missing, ``CUT`` marks the missing items."""
        closing = _CLOSE[_OPEN.index(opening)]
        self.position += 1
        items: list[Any] = []
        pairs: dict[str, Any] = {}
        while (first := self.peek()) != closing:
            if not first or first in _CLOSE or self.nodes <= 0:
                items.append(CUT)
                self.position = len(self.text) if self.nodes <= 0 else self.position
                return self.finish_container(opening, items, pairs)
            if first == ",":
                self.position += 1
                continue
            item = self.value(closing + (",:" if opening == "{" else ","), depth)
            if self.peek() == ":" and opening == "{":
                self.position += 1
                pairs[_key(item)] = self.value(closing + ",", depth)
            else:
                items.append(item)
        self.position += 1
        return self.finish_container(opening, items, pairs)

    @staticmethod
    def finish_container(opening: str, items: list[Any], pairs: dict[str, Any]) -> Any:
        if pairs and items:
            pairs["..."] = CUT  # items: keys without values, or the dots of a cut mapping
        return pairs if pairs or (opening == "{" and not items) else items

    def opaque(self, start: int, ends: str) -> str:
        """Read opaque text up to the first of the characters ``ends`` that is outside brackets."""
        self.position, depth = start, 0
        while self.position < len(self.text):
            unstructured = _UNSTRUCTURED.match(self.text, self.position)
            if unstructured is not None:
                self.position = unstructured.end()
                continue
            character = self.text[self.position]
            if depth <= 0 and character in ends:
                break
            depth += (character in "([{<") - (character in ")]}>")
            self.steps -= 1
            self.position = self.position + 1 if self.steps > 0 else len(self.text)
        return self.check_opaque(self.text[start : self.position].strip())

    def check_opaque(self, text: str) -> str:
        """Return ``text``, or the redaction marker if ``redact_opaque`` is set.

        Raises ``_SensitiveError`` if ``text`` contains a sensitive key.
        """
        if self.redact_opaque:
            return REDACTED
        if self.sensitive_words is None:
            words = set(_WORD.findall(self.text))
            self.sensitive_words = {word for word in words if self.is_sensitive_key(word)}
        if self.sensitive_words and not self.sensitive_words.isdisjoint(_WORD.findall(text)):
            raise _SensitiveError
        return text


_FAILED = object()


def _number_or_constant(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INTEGER.match(word):
        return int(word)
    number = float(word) if _FLOAT.match(word) else nan
    return number if isfinite(number) else _FAILED


def _key(item: object) -> str:
    return (item if isinstance(item, str) else str(item))[:MARGIN]
