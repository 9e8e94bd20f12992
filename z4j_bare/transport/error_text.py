"""Error texts for logs, without secrets and control characters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

#: Characters that delimit the parts of a URL. A password that contains them unescaped is split at
#: them.
_SEPARATORS = re.compile(r"[:/?#@]")

#: Minimum characters of a part of a password that is replaced. A shorter part reveals little, and
#: occurs in other text by chance.
_MIN_SECRET_CHARS = 3


def describe_error(error: BaseException) -> str:
    """Return the error's type and the first line of its text.

    Libraries quote a URL that they cannot parse, for example a proxy's URL with a password. The
    passwords in the proxy variables are replaced by ``***``.
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
