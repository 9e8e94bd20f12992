"""Makes error texts for logs without secrets and control characters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

#: Characters that separate the parts of a URL. An error text may quote only a part of a password
#: between two such characters, so each part is replaced too.
_SEPARATORS = re.compile(r"[:/?#@]")

#: Minimum number of characters of a replaced password or part of a password.
#: Shorter parts occur in other text by chance.
_MIN_SECRET_CHARS = 3


def describe_error(error: BaseException) -> str:
    """Return the error's type and at most 200 characters of the first line of its text.

    Passwords of the proxy environment variables are replaced by ``***``, because a library's error
    text can quote a proxy's URL.
    """
    text = printable(str(error).split("\n", 1)[0])
    for secret in sorted(_proxy_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def printable(text: str) -> str:
    """Replace each control character by a question mark."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _proxy_secrets() -> Iterator[str]:
    for name, address in os.environ.items():
        if name.lower().endswith("_proxy") and "@" in address:
            credentials = address.rpartition("@")[0].rpartition("://")[2]
            _, _, password = credentials.partition(":")
            yield from (
                part
                for part in (password, *_SEPARATORS.split(password))
                if len(part) >= _MIN_SECRET_CHARS
            )
