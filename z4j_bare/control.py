"""Process-level wiring: exit hooks."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable


def register_shutdown_atexit(callback: Callable[[], object]) -> str:
    """Run ``callback`` once at interpreter exit; return ``"threading"`` or ``"atexit"``, whichever hook is the first.

    Both are set. ``threading._register_atexit`` runs before concurrent.futures joins its workers, but never under eventlet,
    whose patched ``threading`` keeps another list than the one that is run (``z4j-1.13-behaviour`` 7.8).
    """
    ran = threading.Event()

    def once() -> None:
        if not ran.is_set():
            ran.set()
            callback()

    atexit.register(once)
    try:
        threading._register_atexit(once)  # type: ignore[attr-defined]  # noqa: SLF001 - no public equivalent
    except (AttributeError, RuntimeError, TypeError):
        return "atexit"
    return "threading"
