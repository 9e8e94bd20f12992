"""Monkey-patching on request, for a process of the agent's own; a host patches itself."""

from __future__ import annotations

import warnings

from z4j_bare.concurrency.detect import CHOICES, detect
from z4j_bare.errors import HostConfigurationError


def patch(name: str) -> None:
    """Patch the process for ``gevent`` or ``eventlet``, before it imports anything that waits; nothing for the others.

    Raises ``HostConfigurationError`` for an unknown name and for a library that is not installed.
    """
    if name not in CHOICES:
        raise HostConfigurationError(f"Z4J_CONCURRENCY={name!r} is not one of {', '.join(CHOICES)}")
    if name in ("auto", "threads") or detect().outcome == name:
        return
    try:
        _patchers[name]()
    except ImportError as error:
        raise HostConfigurationError(
            f"Z4J_CONCURRENCY={name} needs the library: pip install {name} ({error})"
        ) from error


def _patch_gevent() -> None:
    from gevent import monkey

    monkey.patch_all()


def _patch_eventlet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it announces its own retirement
        import eventlet

    eventlet.monkey_patch()


_patchers = {"gevent": _patch_gevent, "eventlet": _patch_eventlet}
