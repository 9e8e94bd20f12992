"""The token and the key, from a file or as a value; read anew at each call, because files are rotated."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from z4j_core.transport.hmac import decode_agent_hmac_secret

from z4j_bare.errors import HostConfigurationError
from z4j_bare.settings import Settings, read_secret

if TYPE_CHECKING:
    from z4j_core.models import Config

#: Bytes of the protocol's key.
KEY_BYTES = 32


def read_token(config: Config, settings: Settings) -> str:
    """Return the agent's token. Raises ``HostConfigurationError`` for a file that cannot be read."""
    path = settings.token_file
    return read_secret(path, "Z4J_TOKEN_FILE") if path else config.token.get_secret_value()


def read_key(config: Config, settings: Settings) -> bytes:
    """Return the project's key. Raises ``HostConfigurationError`` naming the setting."""
    path, value = settings.hmac_secret_file, config.hmac_secret
    variable = "Z4J_HMAC_SECRET_FILE" if path else "Z4J_HMAC_SECRET"
    if path is None and value is None:
        raise HostConfigurationError(
            "Z4J_HMAC_SECRET is missing: set it to the hmac_secret that the brain minted"
        )
    text = read_secret(path, variable) if path else value.get_secret_value() if value else ""
    try:
        key = decode_agent_hmac_secret(text)
    except ValueError:
        raise HostConfigurationError(
            f"{variable} is not the urlsafe-base64 text that the brain minted"
        ) from None
    if len(key) < KEY_BYTES:
        length = len(key)
        raise HostConfigurationError(
            f"{variable} decodes to {length} bytes, but the brain mints {KEY_BYTES}: was it cut?"
        )
    return key


def deployment_id(config: Config, key: bytes) -> str:
    """Return whose rows a store holds: the project's, by two names, so that they do not reach another.

    One is made from its key and stays when the brain moves, one from the brain's address and outlives the key.
    """
    marks = key, str(config.brain_url).rstrip("/").encode()
    return " ".join(
        sha256(b"%b %b" % (config.project_id.encode(), mark)).hexdigest()[:16] for mark in marks
    )
