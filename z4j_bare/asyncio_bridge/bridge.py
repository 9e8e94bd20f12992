"""The synchronous side of the adapters: calls with deadlines, pumps, one loop per process incarnation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from z4j_bare.asyncio_bridge import trampoline
from z4j_bare.asyncio_bridge.worker_pool import WorkerPool
from z4j_bare.errors import AgentError, ForkedChildError
from z4j_bare.interfaces import IBridge

if TYPE_CHECKING:
    from collections.abc import Callable

    from z4j_bare.asyncio_bridge.hubloop import HubLoop
    from z4j_bare.asyncio_bridge.pump import Pump
    from z4j_bare.concurrency import BaseConcurrency

#: Workers for calls that need no loop; apart from the loop's own, so that eight hung offloads leave these
#: alive. As many as commands run at a time by default.
CALLERS = 8
#: Longest deadline in seconds that a caller may ask for.
LONGEST_CALL = 3600.0
#: Seconds that :meth:`Bridge.stop` waits for the loop to end.
STOP_PATIENCE = 1.0


@implementer(IBridge)
class Bridge:
    """Routes every call by the rules of ``adapter-surface`` 5.1.

    Synchronous functions and coroutines without an await run on persistent workers, where no loop is visible;
    anything that awaits becomes a task of the :class:`HubLoop`, which is built on first need. None of the
    methods is for loop steps: the loop would wait for itself.
    """

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._lock = backend.lock()
        self._workers = WorkerPool(backend, "z4j-call", CALLERS)
        self._loop: HubLoop | None = None
        self._pumps: list[Pump] = []
        self._stopped = False

    @property
    def restarts(self) -> int:
        """How often a pump or the loop had to be started again."""
        return sum(pump.restarts for pump in self._pumps) + (
            self._loop.restarts if self._loop else 0
        )

    @property
    def dropped(self) -> int:
        """How many ``call_soon_threadsafe`` came too late."""
        return self._loop.dropped if self._loop else 0

    @property
    def busy(self) -> int:
        """How many workers run a call now; one that stays here is hung."""
        return self._workers.busy + (self._loop.busy_workers if self._loop else 0)

    def call(self, function: Callable[..., Any], *args: Any, timeout: float, **kwargs: Any) -> Any:
        """Call ``function(*args, **kwargs)``, whatever its kind, and return its result; see ``IBridge``.

        After ``timeout`` seconds (at most :data:`LONGEST_CALL`) a task is cancelled; a blocking body keeps
        its worker until it returns, and one that had not begun never runs. ``AgentError`` after :meth:`stop`.
        """
        self._refuse()
        what = _name(function)
        deadline = self._backend.now() + min(timeout, LONGEST_CALL)
        job = partial(function, *args, **kwargs)
        if trampoline.needs_loop(function):
            return self._await(job(), deadline, what)
        value = self._workers.call(trampoline.step, job, timeout=self._left(deadline), what=what)
        if isinstance(value, trampoline.Unfinished):
            return self._await(value.awaitable, deadline, what)
        return value

    def pump(
        self, iterate: Callable[[], Any], sink: Callable[[Any], object], name: str
    ) -> Callable[[], None]:
        """Feed every item of ``iterate()`` to ``sink``; the returned function drains and ends that.

        See :class:`~z4j_bare.asyncio_bridge.pump.Pump`.
        """
        loop = self.loop()
        from z4j_bare.asyncio_bridge.pump import Pump  # after the loop, which brought asyncio along

        pump = Pump(self._backend, loop, iterate, sink, name)
        self._pumps.append(pump)
        loop.call_soon_threadsafe(pump.begin)
        return pump.end

    def loop(self) -> HubLoop:
        """Return the loop itself, the same one each time: arq and taskiq compare identities.

        ``AgentError`` when none was built before :meth:`stop`.
        """
        if self._loop is None:
            self._refuse()
            self._build()
        assert self._loop is not None  # noqa: S101 - _build has just set it
        return self._loop

    def stop(self, timeout: float = STOP_PATIENCE) -> None:
        """Cancel what runs, end the loop within ``timeout`` seconds. Idempotent; no-op in a forked child."""
        if self._backend.forked():
            return
        self._stopped = True
        self._workers.stop()
        with self._lock:
            loop = self._loop
        if loop is not None:
            loop.shutdown(timeout)

    def _refuse(self) -> None:
        if self._backend.forked():
            raise ForkedChildError
        if self._stopped:
            raise AgentError("the agent is stopping")
        if self._loop is not None and self._loop.in_step():
            raise AgentError(
                "called from a step of the adapters' loop, which would wait for itself"
            )

    def _build(self) -> None:
        hubloop = self._backend.import_module("z4j_bare.asyncio_bridge.hubloop")
        with self._lock:
            if self._loop is None and not self._stopped:
                loop = hubloop.HubLoop(self._backend)
                loop.start()
                self._loop = loop
        self._refuse()

    def _left(self, deadline: float) -> float:
        return max(0.0, deadline - self._backend.now())

    def _await(self, awaitable: Any, deadline: float, what: str) -> Any:
        loop = self.loop()
        from z4j_bare.asyncio_bridge.calls import LoopCall

        return LoopCall(self._backend, loop, awaitable).run(self._left(deadline), what)


def _name(function: Any) -> str:
    """Return what a call is called; not its ``repr``, which holds a command's arguments."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)
