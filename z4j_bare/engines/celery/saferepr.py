"""Values out of the text that Celery makes of them.

A worker's events carry arguments and results as Celery's ``saferepr``: Python's notation, cut at a length and a depth, with
only quotes escaped. Redaction goes by key, so the structure has to be found again; what cannot be read stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isfinite, nan
from typing import Any

from z4j_core.redaction.markers import REDACTED

from z4j_bare.events.snapshot import MARGIN, MAX_DEPTH, MAX_NODES, snapshot

#: Characters of one text that are read; Celery sends 1,024 unless it is told otherwise.
MAX_TEXT = 8 * 1024

#: Brackets and commas that are looked at in text that cannot be read; after that the rest is one piece.
MAX_STEPS = 2000

#: What stands where Celery, or we, left something out.
CUT = "[... cut]"

_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)
_PLAIN = re.compile(r"[-+.\w]+")
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}\Z")
_FLOAT = re.compile(r"[-+]?[0-9]{1,300}(?:\.[0-9]{0,300})?(?:[eE][-+]?[0-9]{1,4})?\Z")
_DULL = re.compile(r"[^()<>\[\]{},:]+")
_WORD = re.compile(r"[A-Za-z_][\w-]*")
_CONSTANTS = {"None": None, "True": True, "False": False, "...": CUT}
_OPEN, _CLOSE = "([{", ")]}"


class ReprText(str):
    """Such a text, at most ``MAX_TEXT`` characters of it."""

    __slots__ = ()


def keep(value: Any) -> Any:
    """Return a bounded copy of what an event brought as argument or result: text to :func:`read`, or a snapshot."""
    return ReprText(value[:MAX_TEXT]) if isinstance(value, str) else snapshot(value)


def read(text: str, is_sensitive_key: Callable[[str], bool]) -> Any:
    """Return the value that ``text`` tells of, in JSON's types. Never raises; 0.3 ms for 1,000 characters of short pairs.

    Tuples and sets become lists, bytes the name of their class, what is no literal stays text.

    :param secret: whether a word is a key whose value must be redacted. Where unreadable text contains one, no unreadable
        text is passed on: nobody can say where its value ends.
    """
    try:
        return _Reader(text, is_sensitive_key).whole()
    except _SensitiveError:
        return _Reader(text, is_sensitive_key, hide=True).whole()


class _SensitiveError(Exception):
    """Unreadable text names a key that redaction hides."""


class _Reader:
    """One pass over a text. Every method leaves ``at`` behind what it has read, and always gets to the end."""

    def __init__(
        self, text: str, is_sensitive_key: Callable[[str], bool], *, hide: bool = False
    ) -> None:
        self.text = text[:MAX_TEXT]
        self.at = 0
        self.nodes = MAX_NODES
        self.steps = MAX_STEPS
        self.is_sensitive_key = is_sensitive_key
        self.hide = hide
        self.secrets: set[str] | None = None

    def whole(self) -> Any:
        value = self.value("", MAX_DEPTH)
        return value if self.next() == "" else self.loose(0, "")

    def next(self) -> str:
        """Return the next character that is no space, without reading it; empty at the end."""
        found = self.text[self.at : self.at + 1]
        while found in {" ", "\n"}:
            self.at += 1
            found = self.text[self.at : self.at + 1]
        return found

    def value(self, ends: str, depth: int) -> Any:
        """Read one value, which one of the characters ``ends``, or the end of the text, has to follow."""
        self.nodes -= 1
        first = self.next()
        began = self.at
        value = self.exact(first, depth) if self.nodes > 0 else _FAILED
        follows = self.next()
        # Without a look at what follows, text with a backslash before its last quote would swallow the next key.
        if value is _FAILED or (follows and follows not in ends):
            return self.loose(began, ends)
        return value

    def exact(self, first: str, depth: int) -> Any:
        if first and first in _OPEN:
            return self.container(first, depth - 1) if depth else _FAILED
        if first == "'":
            return self.string()
        if self.text.startswith("b'", self.at):
            self.at += 1
            return _FAILED if self.string() is _FAILED else "<builtins.bytes>"
        found = _PLAIN.match(self.text, self.at)
        if found is None:
            return _FAILED
        self.at = found.end()
        return _plain(found.group())

    def string(self) -> Any:
        found = _STRING.match(self.text, self.at)
        if found is None:
            return _FAILED
        self.at = found.end()
        return found.group(1).replace("\\'", "'")

    def container(self, opening: str, depth: int) -> Any:
        """Read up to the closing bracket; one that is missing was cut off."""
        closing = _CLOSE[_OPEN.index(opening)]
        self.at += 1
        items: list[Any] = []
        pairs: dict[str, Any] = {}
        while (first := self.next()) != closing:
            if not first or first in _CLOSE or self.nodes <= 0:
                items.append(CUT)
                self.at = len(self.text) if self.nodes <= 0 else self.at
                return self.filled(opening, items, pairs)
            if first == ",":
                self.at += 1
                continue
            item = self.value(closing + (",:" if opening == "{" else ","), depth)
            if self.next() == ":" and opening == "{":
                self.at += 1
                pairs[_key(item)] = self.value(closing + ",", depth)
            else:
                items.append(item)
        self.at += 1
        return self.filled(opening, items, pairs)

    @staticmethod
    def filled(opening: str, items: list[Any], pairs: dict[str, Any]) -> Any:
        if pairs and items:
            pairs["..."] = CUT  # a key without its value, or three dots: Celery's mark for more
        return pairs if pairs or (opening == "{" and not items) else items

    def loose(self, began: int, ends: str) -> str:
        """Take everything up to one of ``ends`` outside of brackets and quotes as text."""
        self.at, depth = began, 0
        while self.at < len(self.text):
            dull = _DULL.match(self.text, self.at)
            if dull is not None:
                self.at = dull.end()
                continue
            character = self.text[self.at]
            if depth <= 0 and character in ends:
                break
            depth += (character in "([{<") - (character in ")]}>")
            self.steps -= 1
            self.at = self.at + 1 if self.steps > 0 else len(self.text)
        return self.judged(self.text[began : self.at].strip())

    def judged(self, text: str) -> str:
        if self.hide:
            return REDACTED
        if self.secrets is None:
            self.secrets = {
                word for word in set(_WORD.findall(self.text)) if self.is_sensitive_key(word)
            }
        if self.secrets and not self.secrets.isdisjoint(_WORD.findall(text)):
            raise _SensitiveError
        return text


_FAILED = object()


def _plain(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INTEGER.match(word):
        return int(word)
    number = float(word) if _FLOAT.match(word) else nan
    return number if isfinite(number) else _FAILED


def _key(item: Any) -> str:
    return (item if isinstance(item, str) else str(item))[:MARGIN]
