"""Choice of the backend at ``start()``, from what ``sys.modules`` says about monkey-patching, and patching on request."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from z4j_bare.concurrency.base import BaseConcurrency
from z4j_bare.errors import HostConfigurationError

CHOICES = ("auto", "threads", "gevent", "eventlet")

_BACKENDS = {
    "threads": ("z4j_bare.concurrency.threads", "ThreadsConcurrency"),
    "gevent": ("z4j_bare.concurrency.gevent", "GeventConcurrency"),
    "eventlet": ("z4j_bare.concurrency.eventlet", "EventletConcurrency"),
}


@dataclass(frozen=True, slots=True)
class Detection:
    """What is patched. ``library`` is ``gevent``, ``eventlet`` or empty."""

    library: str = ""
    thread: bool = False
    socket: bool = False

    @property
    def outcome(self) -> str:
        """``none``, ``gevent``, ``eventlet`` or ``partial``."""
        if self.thread and self.socket:
            return self.library
        return "partial" if self.thread or self.socket else "none"


def detect(modules: Mapping[str, ModuleType | Any] | None = None) -> Detection:
    """Look at ``modules`` (default: ``sys.modules``) and say what has been patched, and by whom."""
    modules = sys.modules if modules is None else modules
    gevent = modules.get("gevent.monkey")
    if gevent is not None:
        thread, socket = (bool(gevent.is_module_patched(name)) for name in ("threading", "socket"))
        if thread or socket:
            return Detection("gevent", thread, socket)
    eventlet = modules.get("eventlet.patcher")
    if eventlet is not None:
        thread, socket = (bool(eventlet.is_monkey_patched(name)) for name in ("thread", "socket"))
        if thread or socket:
            return Detection("eventlet", thread, socket)
    return Detection()


def choose(setting: str, found: Detection) -> str:
    """Return the backend's name for a ``Z4J_CONCURRENCY`` setting in a process in the ``found`` state.

    Raises ``HostConfigurationError`` for an unknown setting and for one that the process cannot
    carry.
    """
    if setting not in CHOICES:
        raise HostConfigurationError(
            f"Z4J_CONCURRENCY={setting!r} is not one of {', '.join(CHOICES)}"
        )
    wanted = (
        setting
        if setting != "auto"
        else (found.library if found.outcome != "partial" else "threads")
    )
    _check(wanted or "threads", setting, found)
    return wanted or "threads"


def _check(wanted: str, setting: str, found: Detection) -> None:
    if wanted == "threads" and found.thread:
        raise HostConfigurationError(
            f"{found.library} has patched threads"
            + ("" if found.socket else " but not sockets")
            + f", so Z4J_CONCURRENCY={setting} cannot work: call {found.library}'s full monkey patch before anything "
            "else is imported, and leave Z4J_CONCURRENCY at auto"
        )
    if wanted != "threads" and not (found.library == wanted and found.socket):
        raise HostConfigurationError(
            f"Z4J_CONCURRENCY={setting} in a process whose sockets {wanted} has not patched: the agent would block its "
            f"host. Patch first ({wanted} monkey patching, before anything else is imported) or leave it at auto"
        )


def build(name: str) -> BaseConcurrency:
    """Import the backend called ``name`` and return a new backend."""
    module, attribute = _BACKENDS[name]
    backend: BaseConcurrency = getattr(import_module(module), attribute)()
    return backend


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
