"""The running-loop mark, visible only while a loop step executes.

``asyncio`` records the running loop per OS thread, and all greenlets of a hub share one. A loop that keeps
its mark on while it is parked makes every ``asyncio.run()`` of the host fail and every Django ORM call raise
``SynchronousOnlyOperation`` (``adapter-surface`` 4, rows 6-8). A loop parks in ``selector.select()`` and
nowhere else, so that is where the mark comes off.
"""

from __future__ import annotations

import selectors
import sys
from asyncio.events import _get_running_loop, _set_running_loop
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent

from z4j_bare.concurrency.timeslice import SLICE_SECONDS

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Iterator, Mapping

    from z4j_bare.concurrency import BaseConcurrency

#: Longest park in seconds. Heals what cannot wake us: a ``put_nowait`` from a foreign thread, which calls no
#: ``call_soon_threadsafe``, and eventlet's epoll set, which a forked child shares and edits.
LONGEST_PARK = 1.0


class StepScopedSelector(selectors.BaseSelector):
    """A cooperative selector that takes the loop's marks off its thread while it waits.

    The marks are the running loop and the async-generator hooks. Whatever another loop (a user's, in a
    sibling greenlet) had on the thread when a step began is put back when the step ends.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._inner: selectors.BaseSelector = backend.selector()
        self._loop: AbstractEventLoop | None = None
        self._outer: AbstractEventLoop | None = None
        self._outer_hooks = self._hooks = sys.get_asyncgen_hooks()
        self._ready: list[tuple[selectors.SelectorKey, int]] = []
        self._give_way_at = 0.0
        self._parked = self._called = False
        self._home: object = None

    def in_step(self) -> bool:
        """Whether the caller is a step of the loop.

        Asks for the greenlet (a thread has one too), not for the mark: an adapter's step that switches shows
        its mark to everybody for that long.
        """
        return self._home is getcurrent()

    def enter(self, loop: AbstractEventLoop) -> None:
        """Clear the thread for ``loop.run_forever()``, which refuses to start under another loop's mark."""
        self._loop, self._home = loop, getcurrent()
        self._outer, self._outer_hooks = _get_running_loop(), sys.get_asyncgen_hooks()
        _set_running_loop(None)

    def leave(self) -> None:
        """Put back what the last step found, now that ``run_forever()`` has ended."""
        _set_running_loop(self._outer)
        sys.set_asyncgen_hooks(*self._outer_hooks)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the marks off inside a step, around something that may switch: logging is enough."""
        if not self.in_step():
            yield
            return
        self._hide()
        try:
            yield
        finally:
            self._show()

    def needs_waking(self) -> bool:
        """Note a call from outside the loop; whether it has to write to the self-pipe.

        Only the first call after the loop parked has to: a write costs a system call, and events come in
        thousands. Callers append to the loop's queue before, ``select`` looks after announcing its park; one
        of the two notices.
        """
        self._called = True
        parked, self._parked = self._parked, False
        return parked

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for I/O with the marks off; ``ForkedChildError`` on waking in a forked child."""
        self._parked = True
        if self._called:
            timeout = 0
        try:
            if timeout is not None and timeout <= 0 and self._backend.now() < self._give_way_at:
                return []
            return self._park(LONGEST_PARK if timeout is None else min(timeout, LONGEST_PARK))
        finally:
            self._parked = self._called = False

    def wait(self, timeout: float) -> bool:
        """Select; shaped like an event, so that ``call_blocking`` guards it against forks and times the step."""
        self._ready = self._inner.select(timeout)
        return bool(self._ready)

    def _park(self, timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
        self._hide()
        try:
            if timeout <= 0:
                self._backend.sleep(
                    0
                )  # gevent's selector does not run the hub when asked not to block
            self._backend.call_blocking(self.wait, timeout)
        finally:
            self._show()
            self._give_way_at = self._backend.now() + SLICE_SECONDS
        ready, self._ready = self._ready, []
        return ready

    def _hide(self) -> None:
        self._hooks = sys.get_asyncgen_hooks()
        self.leave()

    def _show(self) -> None:
        self._outer, self._outer_hooks = _get_running_loop(), sys.get_asyncgen_hooks()
        _set_running_loop(self._loop)
        sys.set_asyncgen_hooks(*self._hooks)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Delegate."""
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Delegate."""
        return self._inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Delegate."""
        return self._inner.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Delegate."""
        return self._inner.get_map()

    def close(self) -> None:
        """Delegate."""
        self._inner.close()
