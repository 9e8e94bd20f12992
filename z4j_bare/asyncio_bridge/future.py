"""A result handed from a worker or an event loop to a waiting task. Imports no asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.errors import AgentError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency


class CallFuture:
    """The result of one call, set by a worker or a loop step, awaited by a greenlet or thread."""

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._done = backend.event()
        self._ok = False
        self._value: Any = None
        #: Whether the caller stopped waiting before there was a result.
        self.abandoned = False

    def is_awaited(self) -> bool:
        """Return whether the caller still waits."""
        return not self.abandoned

    def set_result(self, ok: bool, value: object) -> None:
        """Set the value, or the exception when not ``ok``.

        Never switches greenlets, so that loop steps may call it.
        """
        self._ok, self._value = ok, value
        self._done.set()

    def wait(self, timeout: float, description: str) -> Any:
        """Return the value or raise the exception.

        Raises ``TimeoutError`` with ``description`` after ``timeout`` seconds. When the wait ends
        early (timeout, killed greenlet, fork), the future counts as abandoned.
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
    """Return ``error``, or an ``AgentError`` with that cause if ``error`` would end a loop.

    ``SystemExit`` raised in an eager task would end ``run_forever``. A greenlet's ``Timeout`` or
    ``GreenletExit`` would end the calling loop. asyncio futures refuse ``StopIteration``.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = AgentError(f"{type(error).__name__} escaped from an adapter: {error}")
    wrapped.__cause__ = error
    return wrapped
