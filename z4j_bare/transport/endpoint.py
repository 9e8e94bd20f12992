"""The brain's addresses, from ``Z4J_BRAIN_URL``."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from z4j_bare.errors import HostConfigurationError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def base_url(brain_url: str, *, dev_mode: bool) -> SplitResult:
    """Return the brain's address in parts; a path prefix is kept.

    Raises ``HostConfigurationError`` for plain HTTP to a host that is not this one, unless ``dev_mode``.
    """
    parts = urlsplit(brain_url.rstrip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HostConfigurationError(f"Z4J_BRAIN_URL={brain_url!r} is not an http(s) address")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and not dev_mode:
        raise HostConfigurationError(
            f"Z4J_BRAIN_URL={brain_url!r} would send the token in the clear: use https://, or dev_mode on a trusted network"
        )
    return parts


def websocket_url(brain_url: str, *, dev_mode: bool) -> str:
    """Return ``<brain_url>/ws/agent`` with the scheme turned to ``ws`` or ``wss``; see :func:`base_url`."""
    parts = base_url(brain_url, dev_mode=dev_mode)
    scheme = "wss" if parts.scheme == "https" else "ws"
    return f"{scheme}://{parts.netloc}{parts.path}/ws/agent"


def longpoll_url(brain_url: str, *, dev_mode: bool) -> str:
    """Return ``<brain_url>/api/v1``; see :func:`base_url`."""
    parts = base_url(brain_url, dev_mode=dev_mode)
    return f"{parts.scheme}://{parts.netloc}{parts.path}/api/v1"
