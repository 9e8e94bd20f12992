"""Passes a result from a worker or an event loop to a waiting task, without asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.errors import AgentError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency


class CallFuture:
    """The result of one call. A worker or a loop step sets the result, and a task waits for it."""

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._done = backend.event()
        self._ok = False
        self._value: Any = None
        #: Whether the caller stopped waiting before the result was set.
        self.abandoned = False

    def is_awaited(self) -> bool:
        """Return whether the caller still waits."""
        return not self.abandoned

    def set_result(self, ok: bool, value: object) -> None:
        """Set the result. ``value`` is the returned value if ``ok``, and the exception if not.

        This method never switches greenlets, so a loop step may call it.
        """
        self._ok, self._value = ok, value
        self._done.set()

    def wait(self, timeout: float, description: str) -> Any:
        """Return the value or raise the exception.

        Raises ``TimeoutError`` after ``timeout`` seconds. If the wait ends without a result
        (timeout, killed greenlet, fork), ``abandoned`` becomes true.
        """
        try:
            done = self._backend.wait(self._done, timeout)
        finally:
            self.abandoned = not self._done.is_set()
        if not done:
            raise TimeoutError(f"{description} did not finish within {timeout:g} s")
        if self._ok:
            return self._value
        raise self._value


def as_exception(error: BaseException) -> Exception:
    """Return ``error``, or an ``AgentError`` that replaces an error that a loop must not raise.

    A ``SystemExit`` in an eager task would end ``run_forever``. The ``Timeout`` or ``GreenletExit``
    of a greenlet library would end the agent's loop that made the call. An asyncio future does not
    accept ``StopIteration``.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = AgentError(f"{type(error).__name__} escaped from an adapter: {error}")
    wrapped.__cause__ = error
    return wrapped
