"""Coroutines that await nothing need no loop: one ``send`` runs them to their end.

Most adapter methods are such (huey has no other), and some of them block: on a loop they would stall it with
the running mark on (``adapter-surface`` 4, row 4). Rule 5.1.2 there.
"""

from __future__ import annotations

import inspect
from functools import partial
from opcode import opmap
from types import CodeType, CoroutineType, coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

#: Whatever suspends a coroutine compiles to one of these: await, async for and async with alike.
_SUSPENDING = frozenset(opmap[name] for name in ("GET_AWAITABLE", "SEND"))


def is_await_free(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is a coroutine function without an await in it.

    Looks through ``functools.partial``, bound methods, callable objects and the synchronous layers that
    ``functools.wraps`` leaves. Compiled coroutine functions and asynchronous generators are not.
    """
    code = _code(function)
    return code is not None and _runs_through(code)


def needs_loop(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` makes a coroutine that awaits, so that the call itself runs nothing."""
    return inspect.iscoroutinefunction(function) and not is_await_free(function)


class Unfinished:
    """What a call left over that only a loop can finish."""

    def __init__(self, awaitable: Any) -> None:
        self.awaitable = awaitable


def step(function: Callable[..., Any]) -> Any:
    """Call ``function()`` without any loop and return its result.

    Returns :class:`Unfinished` for a coroutine that awaits or an awaitable that is none. A coroutine that
    suspends against expectation is handed over as it stands, to be continued: what it has done must not be
    done twice.
    """
    value = function()
    if not inspect.isawaitable(value):
        return value
    if not isinstance(value, CoroutineType) or not _runs_through(value.cr_code):
        return Unfinished(value)
    return send(value)


def send(started: CoroutineType[Any, Any, Any]) -> Any:
    """Run a coroutine up to its end, or to its first suspension and return it as :class:`Unfinished`."""
    try:
        pending = started.send(None)
    except StopIteration as end:
        return end.value
    return Unfinished(_continue(started, pending))


@coroutine
def _continue(started: CoroutineType[Any, Any, Any], pending: Any) -> Generator[Any, Any, Any]:
    """Yield ``pending`` to the loop in place of ``started``, which did already; then pass all through."""
    while True:
        try:
            resume = partial(started.send, (yield pending))
        except BaseException as error:
            resume = partial(started.throw, error)
        try:
            pending = resume()
        except StopIteration as end:
            return end.value


def _runs_through(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_COROUTINE) and _SUSPENDING.isdisjoint(code.co_code[::2])


def _code(function: Any) -> CodeType | None:
    """Return the code that runs when the coroutine of ``function`` is stepped."""
    while True:
        if isinstance(function, partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif not inspect.isfunction(function) and inspect.isfunction(type(function).__call__):
            function = type(function).__call__
        elif hasattr(function, "__wrapped__") and not inspect.iscoroutinefunction(function):
            function = function.__wrapped__
        else:
            return getattr(function, "__code__", None)
