"""Makes the brain's URLs and the TLS context from the settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from z4j_bare.errors import HostConfigurationError

if TYPE_CHECKING:
    import ssl

#: Hosts to which plain HTTP is always allowed.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def base_url(brain_url: str, *, dev_mode: bool) -> SplitResult:
    """Split the brain's URL, whose path is the prefix of the brain's routes.

    Raises ``HostConfigurationError`` if the scheme is neither ``http`` nor ``https``, and for
    ``http`` to a host outside :data:`LOOPBACK` without ``dev_mode``.
    """
    parts = urlsplit(brain_url.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HostConfigurationError(f"Z4J_BRAIN_URL={brain_url!r} is not an http(s) URL")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and not dev_mode:
        raise HostConfigurationError(
            f"Z4J_BRAIN_URL={brain_url!r} would send the token in the clear: "
            "use https://, or dev_mode on a trusted network"
        )
    return parts


def websocket_url(brain_url: str, *, dev_mode: bool) -> str:
    """Return the URL of the brain's WebSocket route; see :func:`base_url` for errors."""
    parts = base_url(brain_url, dev_mode=dev_mode)
    scheme = "wss" if parts.scheme == "https" else "ws"
    return f"{scheme}://{parts.netloc}{parts.path}/ws/agent"


def longpoll_url(brain_url: str, *, dev_mode: bool) -> str:
    """Return the base URL of the brain's HTTP routes; see :func:`base_url` for errors."""
    parts = base_url(brain_url, dev_mode=dev_mode)
    return f"{parts.scheme}://{parts.netloc}{parts.path}/api/v1"


def tls_context(
    ca_bundle: Path | None, client_cert: Path | None, client_key: Path | None
) -> ssl.SSLContext:
    """Return a TLS context that verifies the certificate and the host name.

    The agent creates one context at start, because loading the CA certificates takes 20 ms of CPU
    time. Without ``ca_bundle``, the certificates come from ``REQUESTS_CA_BUNDLE``,
    ``SSL_CERT_FILE`` or the system, in this order.

    Raises ``HostConfigurationError`` if a file cannot be used.
    """
    import ssl

    bundle = ca_bundle or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    try:
        context = ssl.create_default_context(cafile=None if bundle is None else str(bundle))
    except (OSError, ValueError) as error:
        raise HostConfigurationError(
            f"Z4J_CA_BUNDLE={bundle}: no usable certificates ({error})"
        ) from None
    if client_cert is not None:
        try:
            context.load_cert_chain(client_cert, client_key)
        except (OSError, ValueError) as error:
            raise HostConfigurationError(
                f"Z4J_CLIENT_CERT={client_cert}: not usable ({error})"
            ) from None
    return context
