"""Collects the texts and the log lines in the source of a package, as patterns."""

import ast
import re
from functools import cache
from pathlib import Path

#: Placeholder for any value in a text or a quotation.
ANY = "\0"

#: A word, and not a value such as a path or an address.
_WORD = re.compile(r"^\W*([a-z_]+)\W*$")

#: Minimum share of the letters of a quotation's words that a text must contain.
_MIN_SHARE = 0.4

_LOG_METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical", "log"})
_PERCENT = re.compile(r"%(?:\(\w+\))?[-+ #0]*\d*(?:\.\d+)?[diouxXeEfFgGcrsa]")


class Texts(ast.NodeVisitor):
    """The string constants of a package without its docstrings, and the texts of its log calls.

    A value that is filled in at run time is :data:`ANY`.
    """

    def __init__(self, folder):
        self.texts = set()
        self.log_lines = set()
        for path in sorted(Path(folder).rglob("*.py")):
            self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):  # a docstring is such a statement
            self.generic_visit(node)

    def visit_Call(self, node):
        name = getattr(node.func, "attr", "")
        if name in _LOG_METHODS:
            self.log_lines.update(text for each in node.args for text in self._texts_in(each))
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.texts.add(_with_gaps(node.value))

    def visit_JoinedStr(self, node):
        self.texts.add(_joined(node))
        self.generic_visit(node)

    def visit_BinOp(self, node):
        if isinstance(node.op, ast.Add) and (text := _concatenated(node)) is not None:
            self.texts.add(text)
        self.generic_visit(node)

    def _texts_in(self, node):
        for child in ast.walk(node):
            if isinstance(child, ast.Constant) and isinstance(child.value, str):
                yield _with_gaps(child.value)
            elif isinstance(child, ast.JoinedStr):
                yield _joined(child)


@cache
def texts_of(folder):
    """Return the :class:`Texts` of a package's directory."""
    return Texts(folder)


def _with_gaps(text):
    return re.sub(r"\{\w*\}", ANY, _PERCENT.sub(ANY, text)).replace("%%", "%")


def _joined(node):
    return "".join(part.value if isinstance(part, ast.Constant) else ANY for part in node.values)


def _concatenated(node):
    """Return the text of ``a + b``, or ``None`` if neither side is a text."""
    sides = [
        _concatenated(side) if isinstance(side, ast.BinOp) else _text(side)
        for side in (node.left, node.right)
    ]
    return (
        None if sides == [None, None] else "".join(ANY if side is None else side for side in sides)
    )


def _text(node):
    if isinstance(node, ast.JoinedStr):
        return _joined(node)
    return (
        _with_gaps(node.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        else None
    )


def quotes(quotation, text, whole=False):
    """Whether a text can be what the quotation shows: ``...`` and ``<name>`` stand for any value.

    The text itself, without filled-in values, must contain :data:`_MIN_SHARE` of the words.

    :param whole: whether the quotation must be the whole text, not only a part of it.
    """
    quoted = re.sub(r"\.\.\.|<[\w -]+>", ANY, quotation)
    if not whole:
        quoted = ANY + quoted + ANY
    letters = _letters_of_words(quoted)
    needed = max(1, _MIN_SHARE * len(letters))
    known = set(re.findall("[a-z]+", text.lower()))
    if sum(len(word) for word in re.findall("[a-z]+", quoted.lower()) if word in known) < needed:
        return False  # the cheap test first
    matched = _matched_letters(quoted, text, letters)
    return matched is not None and matched >= needed


def _letters_of_words(text):
    """Return the positions of the letters of words. Paths and addresses are not words."""
    tokens = re.finditer(rf"[^\s{ANY}]+", text)
    return {at for token in tokens if _WORD.match(token[0]) for at in range(*token.span())}


def _matched_letters(quoted, text, letters):
    """Return how many letters the text can contribute, or ``None`` if the patterns cannot agree.

    ``best[n]`` is the number for the quotation read so far and the text's first ``n`` characters.
    """
    best = _skip_gaps({0: 0}, text)
    for at, char in enumerate(quoted):
        following = {}
        if char == ANY:
            score = None
            for end in range(min(best, default=len(text) + 1), len(text) + 1):
                score = max(filter(lambda each: each is not None, (score, best.get(end))))
                following[end] = score
        else:
            for end, score in best.items():
                if end < len(text) and text[end] == char:
                    following[end + 1] = max(following.get(end + 1, 0), score + (at in letters))
                if end < len(text) and text[end] == ANY:
                    following[end] = max(following.get(end, 0), score)
        best = _skip_gaps(following, text)
    return best.get(len(text))


def _skip_gaps(best, text):
    """Add the positions that are reached when a gap of the text is empty."""
    for end in sorted(best):
        score = best[end]
        while end < len(text) and text[end] == ANY:
            end += 1
            best[end] = max(best.get(end, 0), score)
    return best
