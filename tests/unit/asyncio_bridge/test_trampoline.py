"""Which coroutines need no loop, and that those get none."""

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


def traced(function):
    @functools.wraps(function)
    def layer(*args, **kwargs):
        return function(*args, **kwargs)

    return layer


def asynchronously_traced(function):
    @functools.wraps(function)
    async def layer(*args, **kwargs):
        return await function(*args, **kwargs)

    return layer


@pytest.mark.parametrize(
    "function",
    [
        free,
        Adapter().free,
        functools.partial(free, 2),
        functools.partial(Adapter().free),
        traced(free),
        Adapter(),
    ],
)
def test_await_free(function):
    """A coroutine function without an await is found through methods, partials, sync layers and callable objects."""
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
        traced(awaiting),
        asynchronously_traced(free),
    ],
)
def test_awaiting(function):
    """Await, async for, async with and an awaiting layer around an await-free function all count as awaiting."""
    assert not is_await_free(function)


@pytest.mark.parametrize("function", [generator, synchronous, len, Adapter])
def test_neither(function):
    """Asynchronous generators, plain functions, builtins and classes are not await-free coroutine functions."""
    assert not is_await_free(function)
    assert not needs_loop(function)


def test_needs_loop_means_that_the_call_runs_nothing():
    """Only a true coroutine function that awaits may be called on the spot; a sync layer around one may not."""
    assert needs_loop(awaiting)
    assert not needs_loop(traced(awaiting))


def test_step_runs_an_await_free_body_without_a_loop():
    """The body sees no running loop and its value comes back."""

    async def body():
        return asyncio._get_running_loop()

    assert step(body) is None
    assert step(synchronous) == 1
    assert step(functools.partial(free, 3)) == 3


def test_step_lets_errors_through():
    """What the body raises reaches the caller as it is."""

    async def body():
        raise LookupError("x")

    with pytest.raises(LookupError):
        step(body)


def test_step_hands_over_what_awaits():
    """A sync layer that returns an awaiting coroutine yields it untouched."""
    left = step(traced(awaiting))
    assert isinstance(left, Unfinished)
    assert asyncio.run(left.awaitable) is None


@pytest.mark.parametrize("raises", [False, True])
def test_a_surprising_suspension_is_continued_not_repeated(raises):
    """A coroutine that suspends after a side effect goes on from there, with results and exceptions passed through."""
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

    left = trampoline.send(body())
    assert isinstance(left, Unfinished)
    assert effects == ["before"]

    async def finish():
        return await asyncio.wait_for(left.awaitable, 0.05 if raises else 5)

    if raises:
        with pytest.raises(TimeoutError):
            asyncio.run(finish())
        assert effects == ["before", "cancelled"]
    else:
        assert asyncio.run(finish()) == "done"
        assert effects == ["before", "after"]
