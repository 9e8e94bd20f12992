"""The trampoline: which coroutines need no loop, and how they run without one."""

import asyncio
import functools

import pytest

from z4j_bare.asyncio_bridge import trampoline
from z4j_bare.asyncio_bridge.trampoline import Unfinished, is_await_free, needs_loop, step


async def free(value=1):
    return value


async def awaiting():
    await asyncio.sleep(0)


async def looping(stream):
    async for _ in stream:
        pass


async def entering(manager):
    async with manager:
        pass


async def generator():
    yield 1


def synchronous():
    return 1


class Adapter:
    async def free(self):
        return self

    async def awaiting(self):
        await asyncio.sleep(0)

    async def __call__(self):
        return "called"


def sync_wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def async_wrapped(function):
    @functools.wraps(function)
    async def wrapper(*args, **kwargs):
        return await function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    "function",
    [
        free,
        Adapter().free,
        functools.partial(free, 2),
        functools.partial(Adapter().free),
        sync_wrapped(free),
        Adapter(),
    ],
)
def test_await_free_function_is_found(function):
    """It is found through methods, partials, sync wrappers and callable objects."""
    assert is_await_free(function)
    assert not needs_loop(function)


@pytest.mark.parametrize(
    "function",
    [
        awaiting,
        looping,
        entering,
        Adapter().awaiting,
        functools.partial(awaiting),
        sync_wrapped(awaiting),
        async_wrapped(free),
    ],
)
def test_awaiting_function_is_not_await_free(function):
    """Await, async for, async with and an awaiting wrapper all count as awaiting."""
    assert not is_await_free(function)


@pytest.mark.parametrize("function", [generator, synchronous, len, Adapter])
def test_other_callables_are_neither(function):
    """Async generators, plain functions, builtins and classes are neither of both."""
    assert not is_await_free(function)
    assert not needs_loop(function)


def test_needs_loop_only_for_true_coroutine_functions():
    """A synchronous wrapper around an awaiting function does not count: calling it runs code."""
    assert needs_loop(awaiting)
    assert not needs_loop(sync_wrapped(awaiting))


def test_step_runs_await_free_function_without_loop():
    """The function sees no running loop, and its value is returned."""

    async def body():
        return asyncio._get_running_loop()

    assert step(body) is None
    assert step(synchronous) == 1
    assert step(functools.partial(free, 3)) == 3


def test_step_raises_errors_unchanged():
    """An exception of the function reaches the caller unchanged."""

    async def body():
        raise LookupError("x")

    with pytest.raises(LookupError):
        step(body)


def test_step_returns_awaiting_coroutine_unfinished():
    """An awaiting coroutine returned by a sync wrapper is handed over, not started."""
    unfinished = step(sync_wrapped(awaiting))
    assert isinstance(unfinished, Unfinished)
    assert asyncio.run(unfinished.awaitable) is None


@pytest.mark.parametrize("raises", [False, True])
def test_unexpected_suspension_is_continued_not_repeated(raises):
    """A coroutine that suspends after a side effect continues from there."""
    effects = []

    async def body():
        effects.append("before")
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(10 if raises else 0)
        except asyncio.CancelledError:
            effects.append("cancelled")
            raise
        effects.append("after")
        return "done"

    unfinished = trampoline.send(body())
    assert isinstance(unfinished, Unfinished)
    assert effects == ["before"]

    async def finish():
        return await asyncio.wait_for(unfinished.awaitable, 0.05 if raises else 5)

    if raises:
        with pytest.raises(TimeoutError):
            asyncio.run(finish())
        assert effects == ["before", "cancelled"]
    else:
        assert asyncio.run(finish()) == "done"
        assert effects == ["before", "after"]
