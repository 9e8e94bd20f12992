"""Where a caller waits for what a worker or a loop step produces. No asyncio in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.errors import AgentError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency


class CallFuture:
    """One result on its way from a worker or a loop step to the greenlet or thread that waits for it."""

    def __init__(self, backend: BaseConcurrency) -> None:
        self._backend = backend
        self._settled = backend.event()
        self._ok = False
        self._value: Any = None
        self.abandoned = False

    def wanted(self) -> bool:
        """Whether somebody still waits."""
        return not self.abandoned

    def settle(self, ok: bool, value: Any) -> None:
        """Deliver ``value`` (an exception when not ``ok``). Never switches, so loop steps may call it."""
        self._ok, self._value = ok, value
        self._settled.set()

    def wait(self, timeout: float, what: str) -> Any:
        """Return the value or raise the exception; ``TimeoutError`` naming ``what`` after ``timeout`` s.

        However the wait ends early (time-out, greenlet killed, fork), the outcome counts as abandoned.
        """
        try:
            settled = self._backend.wait(self._settled, timeout)
        finally:
            self.abandoned = not self._settled.is_set()
        if not settled:
            raise TimeoutError(f"{what} did not finish within {timeout:g} s")
        if self._ok:
            return self._value
        raise self._value


def as_exception(error: BaseException) -> Exception:
    """Return ``error`` in a form that futures accept and agent loops survive.

    ``SystemExit`` out of an eager task would end ``run_forever``, a greenlet's ``Timeout`` or
    ``GreenletExit`` the loop that asked; futures refuse ``StopIteration``.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = AgentError(f"{type(error).__name__} escaped from an adapter: {error}")
    wrapped.__cause__ = error
    return wrapped
