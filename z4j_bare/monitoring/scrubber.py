"""Removes secrets from texts that leave this host in a bundle."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, quote_plus, unquote

from z4j_bare.errors import HostConfigurationError
from z4j_bare.settings import read_key, read_secret, read_token

if TYPE_CHECKING:
    from z4j_core.models import Config

    from z4j_bare.settings import Settings

V = TypeVar("V")

#: Replaces a secret.
MASK = "***"

#: A secret with fewer characters is not searched for in texts.
#: It is masked only where the form of the text shows a secret, such as in a URL.
MIN_CHARS = 4

#: Names of variables whose value is a secret.
_SECRET_NAME = re.compile(
    r"pass(?:word|wd|phrase|code)?(?:$|_)|pwd|secret|token|credential|api_?key|_key$|dsn$",
    re.IGNORECASE,
)

#: Names of variables that match :data:`_SECRET_NAME`, but whose value is a path or a pattern.
_PATH_NAME = re.compile(r"_(?:FILE|PATH|DIR|PATTERNS)$", re.IGNORECASE)

#: The forms of texts that contain a secret. The group ``secret`` is replaced.
_FORMS = (
    # The password of a URL, up to the last ``@`` of the word.
    re.compile(r"://[^\s/:@'\"]*:(?P<secret>[^\s'\"]+)@"),
    # The user's name in a URL without a password, if it is long enough to be a key.
    re.compile(r"://(?P<secret>[^\s/:@'\"]{16,})@"),
    # The value of an ``Authorization`` header.
    re.compile(r"\b(?:Bearer|Basic)\s+(?P<secret>[\w.~+/=-]{8,})", re.IGNORECASE),
    # An assignment such as the ``password=...`` of a database's connection string.
    re.compile(
        r"\b\w*(?:password|passwd|pwd)\"?\s*[=:]\s*(?P<secret>[^\s,;&]+)",
        re.IGNORECASE,
    ),
    # An assignment such as the ``access_token=...`` of a URL. Without a limit on the lengths, the
    # time of a search would grow with the square of the text's length.
    re.compile(
        r"\b\w{0,40}(?:token|secret|api_?key|access_?key|credential|signature)\w{0,40}"
        r"(?<!_FILE)(?<!_PATH)=(?P<secret>[^\s,;&'\"]+)",
        re.IGNORECASE,
    ),
)


class Scrubber:
    """Replaces secrets in texts and documents.

    :param secrets: the values to replace. Their usual encodings are replaced too.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        encoded = {each for secret in secrets for each in _encode(secret) if len(each) >= MIN_CHARS}
        # The longest text is replaced first. Otherwise, if it contains a shorter secret, only that
        # part would be replaced and the rest would remain.
        self._encoded = sorted(encoded, key=len, reverse=True)

    def text(self, text: str) -> str:
        """Return ``text`` without secrets."""
        for encoded in self._encoded:
            text = text.replace(encoded, MASK)
        for form in _FORMS:
            text = form.sub(_mask, text)
        return text

    def document(self, value: V) -> V:
        """Return a copy of a document of JSON types without secrets in its keys and texts."""
        scrubbed: object = value
        if isinstance(value, str):
            scrubbed = self.text(value)
        elif isinstance(value, Mapping):
            scrubbed = {self.text(str(key)): self.document(each) for key, each in value.items()}
        elif isinstance(value, list | tuple):
            scrubbed = [self.document(each) for each in value]
        return scrubbed  # type: ignore[return-value]


def configured_secrets(config: Config, settings: Settings) -> list[str]:
    """Return token and HMAC secret of an agent. Reads the files that contain them."""
    secrets = [config.token.get_secret_value()]
    if config.hmac_secret is not None:
        secrets.append(config.hmac_secret.get_secret_value())
    with suppress(HostConfigurationError):
        secrets.append(read_token(config, settings))
    with suppress(HostConfigurationError):
        secrets.append(base64.urlsafe_b64encode(read_key(config, settings)).decode())
    return secrets


def environment_secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the secrets in the environment.

    These are the values of variables whose names suggest a secret, the passwords and keys in URLs
    and in connection strings, and the contents of ``Z4J_TOKEN_FILE`` and ``Z4J_HMAC_SECRET_FILE``.
    """
    secrets = []
    for name, value in (os.environ if environment is None else environment).items():
        if _SECRET_NAME.search(name) and not _PATH_NAME.search(name):
            secrets.append(value)
        secrets += (match["secret"] for form in _FORMS for match in form.finditer(value))
        if name in ("Z4J_TOKEN_FILE", "Z4J_HMAC_SECRET_FILE"):
            with suppress(HostConfigurationError, RuntimeError):  # RuntimeError: no home for ~
                secrets.append(read_secret(Path(value).expanduser(), name))
    return secrets


def _mask(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in match.span("secret"))
    return f"{match[0][:start]}{MASK}{match[0][end:]}"


def _encode(secret: str) -> Iterator[str]:
    """Yield a secret in the encodings in which a log or an address may contain it."""
    texts = {secret, secret.strip(), unquote(secret)}
    raws = {text.encode(errors="surrogateescape") for text in texts}
    with suppress(ValueError):
        # The secret may use either alphabet. ``urlsafe_b64decode`` is not used, because it warns
        # about the standard alphabet from CPython 3.15 on.
        standard = secret.replace("-", "+").replace("_", "/")
        raws.add(base64.b64decode(standard + "=" * (-len(secret) % 4)))
    for text in texts:
        yield text
        yield text.rstrip("=")
        yield quote(text, safe="", errors="replace")
        yield quote(text, errors="replace")
        yield quote_plus(text, errors="replace")
        yield repr(text)[1:-1]
        yield json.dumps(text)[1:-1]
    for raw in raws:
        if len(raw) < MIN_CHARS:
            continue
        for encoded in (base64.b64encode(raw), base64.urlsafe_b64encode(raw)):
            yield encoded.decode()
            yield encoded.decode().rstrip("=")
        yield raw.hex()
        yield raw.hex().upper()
        yield repr(raw)[2:-1]
