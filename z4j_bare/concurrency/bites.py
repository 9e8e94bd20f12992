"""A large import on a hub, in bites: ``requests`` is 100 to 200 ms in one piece, asyncio 70.

For gevent only, whose locks and thread idents importlib uses. Under eventlet it keeps the real ones, so that all greenlets
are one owner to the lock of a module: another one would import it a second time, or get it half done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from greenlet import getcurrent


class _Pauses:
    """A finder that finds nothing: it lets others run before each file that its own greenlet imports."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._home = getcurrent()
        self._sleep = sleep

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del name, path, target
        if getcurrent() is self._home:
            self._sleep(0)
        return None


def load_in_bites(module: str, sleep: Callable[[float], None]) -> Any:
    """Import and return ``module``, yielding between files; whoever else imports one of them meanwhile waits for us."""
    pauses = _Pauses(sleep)
    sys.meta_path.insert(0, pauses)
    try:
        return import_module(module)
    finally:
        sys.meta_path.remove(pauses)
