"""Makes error texts for logs, without secrets and control characters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

#: Characters that delimit the parts of a URL. If a password contains such a character unescaped, an
#: error text may quote only a part of the password.
_SEPARATORS = re.compile(r"[:/?#@]")

#: Minimum number of characters of a password, or of a part of it, for which it is replaced. A
#: shorter part reveals little, and occurs in other text by chance.
_MIN_SECRET_CHARS = 3


def describe_error(error: BaseException) -> str:
    """Return the error's type and at most 200 characters of the first line of its text.

    A library's error text can quote a URL, for example a proxy's URL with its password. Therefore
    this function replaces the passwords from the proxy environment variables by ``***``.
    """
    text = printable(str(error).split("\n", 1)[0])
    for secret in sorted(_proxy_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def printable(text: str) -> str:
    """Return the text with a question mark in place of each control character."""
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
