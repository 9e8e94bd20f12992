"""What to say of an error, and of what a peer said: one line, nothing secret, nothing that steers a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

#: Characters that separate a proxy's password from what is around it, where somebody forgot to escape those within.
_EDGES = re.compile(r"[:/?#@]")

#: Shorter pieces of a password tell little, and would be found in any text.
_SHORTEST = 3


def short(error: BaseException) -> str:
    """Return the error's type and the first line of its text.

    An address that cannot be parsed is quoted by whoever tried, be it that of a proxy with its password.
    """
    text = printable(str(error).split("\n", 1)[0])
    for secret in sorted(_proxy_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def printable(text: str) -> str:
    """Return the text with a question mark for each control character: noise on the line ends up in error messages."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _proxy_secrets() -> Iterator[str]:
    for name, address in os.environ.items():
        if name.lower().endswith("_proxy") and "@" in address:
            credentials = address.rpartition("@")[0].rpartition("://")[2]
            _, _, password = credentials.partition(":")
            yield from (
                piece for piece in (password, *_EDGES.split(password)) if len(piece) >= _SHORTEST
            )
