"""Runs coroutines without an event loop, by one ``send``, if they contain no ``await``.

Most coroutine functions of the adapters contain no ``await``, and some of them block. On an event
loop, a blocking function would block the loop, and the host would see the running loop.
"""

from __future__ import annotations

import inspect
from functools import partial
from opcode import opmap
from types import CodeType, CoroutineType, coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

#: Opcodes of ``await``, ``async for`` and ``async with``, at which a coroutine can suspend.
_SUSPENDING = frozenset(opmap[name] for name in ("GET_AWAITABLE", "SEND"))


def is_await_free(function: Callable[..., object]) -> bool:
    """Return whether ``function`` is a coroutine function without an ``await``.

    Partial objects, bound methods, callable objects and synchronous ``functools.wraps`` wrappers
    are unwrapped first. Returns ``False`` for compiled coroutine functions and asynchronous
    generators.
    """
    code = _code(function)
    return code is not None and _has_no_suspension(code)


def needs_loop(function: Callable[..., object]) -> bool:
    """Return whether ``function`` is a coroutine function that awaits.

    A call of such a function only creates a coroutine.
    """
    return inspect.iscoroutinefunction(function) and not is_await_free(function)


class Unfinished:
    """An awaitable that only an event loop can finish."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self.awaitable = awaitable


def step(function: Callable[..., object]) -> Any:
    """Call ``function()`` without an event loop and return its result.

    Returns :class:`Unfinished` if an event loop is needed: ``function()`` returned a coroutine that
    awaits, or another awaitable. A coroutine that suspends unexpectedly is continued and not
    restarted, because a restart would repeat its side effects.
    """
    value = function()
    if not inspect.isawaitable(value):
        return value
    if not isinstance(value, CoroutineType) or not _has_no_suspension(value.cr_code):
        return Unfinished(value)
    return send(value)


def send(started: CoroutineType[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, or return :class:`Unfinished` at its first suspension."""
    try:
        pending = started.send(None)
    except StopIteration as end:
        return end.value
    return Unfinished(_continue(started, pending))


@coroutine
def _continue(started: CoroutineType[Any, Any, Any], pending: object) -> Generator[Any, Any, Any]:
    """Yield ``pending``, the first item of ``started``, and then all further items."""
    while True:
        try:
            resume = partial(started.send, (yield pending))
        except BaseException as error:
            resume = partial(started.throw, error)
        try:
            pending = resume()
        except StopIteration as end:
            return end.value


def _has_no_suspension(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_COROUTINE) and _SUSPENDING.isdisjoint(code.co_code[::2])


def _code(function: Callable[..., object]) -> CodeType | None:
    """Return the code object of the function that ``function`` wraps, or ``None``."""
    target: Any = function
    while True:
        if isinstance(target, partial):
            target = target.func
        elif inspect.ismethod(target):
            target = target.__func__
        elif not inspect.isfunction(target) and inspect.isfunction(type(target).__call__):
            target = type(target).__call__
        elif hasattr(target, "__wrapped__") and not inspect.iscoroutinefunction(target):
            target = target.__wrapped__
        else:
            code = getattr(target, "__code__", None)
            return code if isinstance(code, CodeType) else None
