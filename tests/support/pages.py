"""Reads the pages of the documentation: code blocks, code spans, links and headings."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

#: Pages that docs/reference.py generates from an ``.in.md`` file and the code.
GENERATED = frozenset({"configuration.md", "contracts.md"})

_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced code block; ``language`` is the word after the fence."""

    language: str
    text: str


class Page:
    """A Markdown file of the repository."""

    def __init__(self, path):
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.text = path.read_text(encoding="utf-8")
        self.prose = _FENCE.sub("", self.text)

    def blocks(self, *languages):
        """Return the code blocks of these languages, or all of them."""
        found = [Block(match[2], match[3]) for match in _FENCE.finditer(self.text)]
        return [block for block in found if not languages or block.language in languages]

    def spans(self):
        """Return the code spans, in which a line break becomes a space."""
        return [" ".join(span.split()) for span in _SPAN.findall(self.prose)]

    def links(self):
        """Return the targets of the links and images that stay in the repository."""
        return [
            target
            for target in _LINK.findall(_SPAN.sub("", self.prose))
            if not re.match(r"[a-z]+:", target)
        ]

    def anchors(self):
        """Return the anchors that GitHub and Sphinx give the headings."""
        return {_anchor(heading) for heading in _HEADING.findall(self.prose)}


def read_pages():
    """Return all written pages, README first."""
    top = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")]
    below = [path for path in sorted(DOCS.rglob("*.md")) if not _is_generated(path)]
    return [Page(path) for path in [*top, ROOT / "benchmarks/README.md", *below]]


def _is_generated(path):
    return "_build" in path.parts or (path.parent == DOCS and path.name in GENERATED)


def _anchor(heading):
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
