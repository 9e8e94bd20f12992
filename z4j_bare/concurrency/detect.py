"""Detects monkey-patching, chooses a backend, and patches a process on request."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from z4j_bare.concurrency.base import BaseConcurrency
from z4j_bare.errors import HostConfigurationError

#: Values of ``Z4J_CONCURRENCY``.
CHOICES = ("auto", "threads", "gevent", "eventlet")

#: Module and class of each backend.
#: :func:`build` imports only the chosen module, because the modules of gevent and eventlet import
#: these libraries.
_BACKENDS = {
    "threads": ("z4j_bare.concurrency.threads", "ThreadsConcurrency"),
    "gevent": ("z4j_bare.concurrency.gevent", "GeventConcurrency"),
    "eventlet": ("z4j_bare.concurrency.eventlet", "EventletConcurrency"),
}


@dataclass(frozen=True, slots=True)
class Detection:
    """Which standard modules are patched by ``library`` (``gevent``, ``eventlet`` or empty)."""

    library: str = ""
    thread: bool = False
    socket: bool = False

    @property
    def outcome(self) -> str:
        """``none``, ``gevent``, ``eventlet``, or ``partial`` (only threads or only sockets)."""
        if self.thread and self.socket:
            return self.library
        return "partial" if self.thread or self.socket else "none"


def detect(modules: Mapping[str, ModuleType] | None = None) -> Detection:
    """Return what is patched in ``modules`` (default: ``sys.modules``). Imports nothing.

    Threads and sockets are checked separately, because only one of them may be patched. kombu
    treats such a process as fully patched, but the agent must not.
    """
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


def choose(setting: str, detection: Detection) -> str:
    """Return the name of the backend for a ``Z4J_CONCURRENCY`` setting.

    Raises ``HostConfigurationError`` if the setting is unknown or does not fit the patches, or if
    the interpreter runs without the GIL.
    """
    _check_known(setting)
    _check_gil()
    if setting != "auto":
        name = setting
    elif detection.outcome == "partial":
        name = "threads"
    else:
        name = detection.library or "threads"
    _check_fits(name, setting, detection)
    return name


def _check_known(setting: str) -> None:
    if setting not in CHOICES:
        raise HostConfigurationError(
            f"Z4J_CONCURRENCY={setting!r} is not one of {', '.join(CHOICES)}"
        )


def _check_gil() -> None:
    # CPython 3.13 and later have the function; earlier versions always have the GIL.
    is_gil_enabled = getattr(sys, "_is_gil_enabled", None)
    if is_gil_enabled is not None and not is_gil_enabled():
        raise HostConfigurationError(
            "this free-threaded Python runs without the GIL: the agent is not safe there, and"
            " gevent does not support it. Set PYTHON_GIL=1 for this process, or use a regular"
            " build of Python"
        )


def _check_fits(name: str, setting: str, detection: Detection) -> None:
    if name == "threads" and detection.thread:
        only = "" if detection.socket else " but not sockets"
        raise HostConfigurationError(
            f"{detection.library} has patched threads{only}, so Z4J_CONCURRENCY={setting} cannot"
            f" work: run the full monkey patch of {detection.library} before any other import, and"
            " set Z4J_CONCURRENCY=auto"
        )
    if name != "threads" and not (detection.library == name and detection.socket):
        raise HostConfigurationError(
            f"Z4J_CONCURRENCY={setting}, but {name} has not patched the sockets of this process, so"
            f" the agent would block it: run the monkey patch of {name} before any other import, or"
            " set Z4J_CONCURRENCY=auto"
        )


def build(name: str) -> BaseConcurrency:
    """Import the backend module for ``name`` and return a new backend."""
    module, attribute = _BACKENDS[name]
    backend: BaseConcurrency = getattr(import_module(module), attribute)()
    return backend


def patch(name: str) -> None:
    """Patch this process for ``gevent`` or ``eventlet``; other backends need no patch.

    Must be called before the process imports a module that uses threads or sockets. Only z4j-bare
    commands call this function, because a host patches itself. Raises ``HostConfigurationError`` if
    the name is unknown or the library is not installed.
    """
    _check_known(name)
    if name in ("auto", "threads") or detect().outcome == name:
        return
    try:
        _PATCHERS[name]()
    except ImportError as error:
        raise HostConfigurationError(
            f"Z4J_CONCURRENCY={name} needs the library: pip install {name} ({error})"
        ) from error


def _patch_gevent() -> None:
    from gevent import monkey

    monkey.patch_all()


def _patch_eventlet() -> None:
    with warnings.catch_warnings():
        # eventlet warns about its own deprecation on import
        warnings.simplefilter("ignore", DeprecationWarning)
        import eventlet

    eventlet.monkey_patch()


_PATCHERS = {"gevent": _patch_gevent, "eventlet": _patch_eventlet}
