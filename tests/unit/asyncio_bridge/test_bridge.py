"""Calls with deadlines, and pumps."""

import asyncio
import itertools
import logging
import time
from collections import defaultdict
from functools import partial

import pytest
from zope.interface.verify import verifyObject

from z4j_bare.asyncio_bridge import pump as pump_module
from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.errors import AgentError
from z4j_bare.interfaces import IBridge


@pytest.fixture
def impatient(monkeypatch):
    """Restarts without their pauses."""
    monkeypatch.setattr(pump_module, "backoff", lambda: itertools.repeat(0.001))


def test_contract(bridge):
    """Bridge offers what IBridge promises."""
    assert verifyObject(IBridge, bridge)


def test_no_loop_for_calls_that_need_none(bridge):
    """Synchronous functions and await-free coroutines run without a loop being visible, or built."""

    async def free(value, *, other):
        return value, other, asyncio._get_running_loop()

    assert bridge.call(asyncio._get_running_loop, timeout=5) is None
    assert bridge.call(free, 1, other=2, timeout=5) == (1, 2, None)
    assert bridge._loop is None


def test_a_late_call_is_named_without_its_arguments(bridge, backend):
    """The time-out names the function, however it is wrapped: its arguments may be a mebibyte, and secret."""

    def charge(_card):
        return backend.event().wait(5)

    with pytest.raises(TimeoutError, match="charge did not finish") as caught:
        bridge.call(partial(partial(charge), "4111"), timeout=0.05)
    assert "4111" not in str(caught.value)


def test_a_blocking_body_blocks_nobody_else(bridge, backend):
    """While an await-free body waits, other calls of both kinds go through; its deadline holds."""
    release = backend.event()

    async def blocking():
        return release.wait(20)

    async def awaiting():
        await asyncio.sleep(0)
        return 1

    results = []
    task = backend.spawn(lambda: results.append(bridge.call(blocking, timeout=20)), name="blocked")
    with pytest.raises(TimeoutError, match="blocking"):
        bridge.call(blocking, timeout=0.05)
    assert bridge.call(awaiting, timeout=5) == 1
    assert bridge.call(int, timeout=5) == 0
    release.set()
    assert task.join(5)
    assert results == [True]


def test_errors_reach_the_caller(bridge):
    """Adapters' own exceptions, TimeoutError included, come out of either route unchanged."""

    class OffloadTimeoutError(Exception):
        pass

    async def free():
        raise OffloadTimeoutError

    async def awaiting():
        await asyncio.sleep(0)
        raise OffloadTimeoutError

    for function in (free, awaiting):
        with pytest.raises(OffloadTimeoutError):
            bridge.call(function, timeout=5)


def test_expiry_cancels_the_task(bridge, until):
    """After its deadline a coroutine is cancelled, and the loop serves the next call."""
    seen = []

    async def endless():
        seen.append("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    while (
        not seen
    ):  # on a busy machine the deadline may pass before the first step; then nothing runs at all
        with pytest.raises(TimeoutError, match="endless"):
            bridge.call(endless, timeout=0.05)
    until(lambda: seen == ["began", "cancelled"])


def test_what_expires_before_its_first_step_never_runs(bridge):
    """A coroutine whose deadline passes while the loop is busy is cancelled unbegun: no side effect comes late."""
    loop, seen = bridge.loop(), []

    async def work():
        seen.append("ran")
        await asyncio.sleep(0)

    def busy():
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass  # blocks without switching, as CPU work does

    loop.call_soon_threadsafe(busy)
    with pytest.raises(TimeoutError):
        bridge.call(work, timeout=0.05)

    async def turn():
        await asyncio.sleep(0.01)

    bridge.call(turn, timeout=5)
    assert seen == []


def test_a_cancelled_coroutine_is_an_error_of_ours(bridge):
    """CancelledError, a BaseException, never leaves the bridge."""

    async def gives_up():
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    with pytest.raises(AgentError):
        bridge.call(gives_up, timeout=5)


def test_system_exit_of_an_adapter_stays_inside(bridge):
    """An eager task that calls sys.exit() inside an adapter neither ends our loop nor the calling one."""

    async def free():
        raise SystemExit(1)

    async def awaiting():
        await asyncio.sleep(0)
        raise SystemExit(1)

    for function in (free, awaiting):
        with pytest.raises(AgentError, match="SystemExit"):
            bridge.call(function, timeout=5)
    assert bridge.call(int, timeout=5) == 0


def test_an_awaitable_out_of_a_sync_function_is_awaited(bridge):
    """A synchronous layer around a coroutine function is called where nothing is visible, its coroutine on the loop."""

    async def inner():
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    class Awaitable:
        def __await__(self):
            return inner().__await__()

    assert bridge.call(lambda: inner(), timeout=5) is bridge.loop()
    assert bridge.call(Awaitable, timeout=5) is bridge.loop()


def test_one_loop(bridge):
    """Everybody gets the same loop object, the one that runs the coroutines."""

    async def adapter():
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    assert bridge.loop() is bridge.loop() is bridge.call(adapter, timeout=5)


def test_many_callers_at_once(bridge, backend):
    """Fifty tasks calling at once each get their own answer."""
    answers = []

    async def echo(number):
        await asyncio.sleep(0.001)
        return number

    tasks = [
        backend.spawn(lambda n=n: answers.append((n, bridge.call(echo, n, timeout=10))), name="c")
        for n in range(50)
    ]
    assert all(task.join(10) for task in tasks)
    assert sorted(answers) == [(n, n) for n in range(50)]


def test_stop_is_idempotent_and_refuses_what_comes_later(backend):
    """After stop, calls fail at once, call_soon_threadsafe is silent, a waiting caller is let go."""
    bridge, caught = Bridge(backend), []
    loop = bridge.loop()

    async def endless():
        await asyncio.Event().wait()

    def waits():
        try:
            bridge.call(endless, timeout=20)
        except AgentError as error:
            caught.append(error)

    task = backend.spawn(waits, name="waits")
    backend.sleep(0.05)
    bridge.stop(5)
    bridge.stop(5)
    assert task.join(5)
    assert len(caught) == 1
    assert loop.is_closed()
    loop.call_soon_threadsafe(caught.append, "late")
    assert bridge.dropped == 1
    assert len(caught) == 1

    async def awaiting():
        await asyncio.sleep(0)

    for function in (awaiting, int):
        with pytest.raises(AgentError):
            bridge.call(function, timeout=5)


def test_stop_without_a_loop(backend):
    """A bridge that nobody used stops, and builds no loop afterwards."""
    bridge = Bridge(backend)
    bridge.stop()
    with pytest.raises(AgentError):
        bridge.loop()
    with pytest.raises(AgentError):
        bridge.pump(lambda: None, print, "late")


def test_pump_delivers_everything_in_order(bridge, backend, until):
    """20,000 events of four producers arrive completely, each producer's in its order, while no loop is visible."""
    loop, seen, leaks = bridge.loop(), defaultdict(list), []

    class Adapter:
        def __init__(self):
            self.queue = asyncio.Queue()

        async def subscribe_events(self):
            while True:
                yield await self.queue.get()

    adapter = Adapter()

    def produce(producer):
        for number in range(5000):
            loop.call_soon_threadsafe(adapter.queue.put_nowait, (producer, number))
            if not number % 100:
                leaks.append(asyncio._get_running_loop())
                backend.sleep(0)

    end = bridge.pump(
        adapter.subscribe_events, lambda item: seen[item[0]].append(item[1]), "events"
    )
    tasks = [backend.spawn(produce, name, name=f"producer-{name}") for name in "abcd"]
    assert all(task.join(20) for task in tasks)
    until(lambda: sum(map(len, seen.values())) == 20_000)
    assert all(numbers == list(range(5000)) for numbers in seen.values())
    assert not any(leaks)
    end()
    assert bridge.restarts == 0


def test_ending_a_pump_lets_queued_items_through(bridge):
    """Items announced before the end reach the sink; ending twice, or after stop, is fine."""
    loop, seen = bridge.loop(), []
    queue = asyncio.Queue()

    async def stream():
        while True:
            yield await queue.get()

    end = bridge.pump(stream, seen.append, "events")
    for number in range(3000):
        loop.call_soon_threadsafe(queue.put_nowait, number)
    end()
    assert seen == list(range(3000))
    end()
    bridge.stop(5)
    end()


def test_a_generator_that_ends_at_once_is_not_respawned(bridge, until, impatient):
    """An adapter without registry changes is asked once."""
    asked = []

    async def stream():
        asked.append(1)
        return
        yield

    end = bridge.pump(stream, asked.append, "registry")
    until(lambda: asked)

    async def turn():
        await asyncio.sleep(0.02)

    bridge.call(turn, timeout=5)
    assert (asked, bridge.restarts) == ([1], 0)
    end()


def test_a_generator_that_raises_is_restarted(bridge, until, impatient, caplog):
    """A failing stream is logged, counted and asked again, and what it yields afterwards arrives."""
    attempts, seen = [], []

    async def stream():
        attempts.append(1)
        yield len(attempts)
        if len(attempts) < 4:
            raise LookupError("broken stream")

    with caplog.at_level(logging.WARNING, "z4j.runtime.adapters"):
        end = bridge.pump(stream, seen.append, "events")
        until(lambda: len(seen) == 4)
    assert bridge.restarts == 3
    assert caplog.text.count("events failed") == 3
    end()


def test_a_stream_that_cancels_itself_is_restarted(bridge, until, impatient):
    """CancelledError or SystemExit out of a stream, without anybody having cancelled the pump, counts as a failure."""
    seen, errors = [], [asyncio.CancelledError, SystemExit]

    async def stream():
        if errors:
            raise errors.pop()
        yield 1

    bridge.pump(stream, seen.append, "events")
    until(lambda: seen == [1])
    assert bridge.restarts == 2


def test_a_call_from_a_step_is_refused(bridge):
    """A step that calls the bridge gets an error instead of a deadlock."""

    async def reenters():
        await asyncio.sleep(0)
        with pytest.raises(AgentError, match="wait for itself"):
            bridge.call(int, timeout=5)
        return 1

    assert bridge.call(reenters, timeout=5) == 1


def test_a_step_that_switches_does_not_disturb_outsiders(bridge, backend, until):
    """While an adapter's step switches and shows its mark, other tasks' calls are not taken for steps."""
    inside, release = [], backend.event()

    async def switches():
        await asyncio.sleep(0)
        inside.append(1)
        return release.wait(20)

    results = []
    task = backend.spawn(lambda: results.append(bridge.call(switches, timeout=20)), name="switches")
    until(lambda: inside)
    assert bridge.call(int, timeout=5) == 0
    release.set()
    assert task.join(5)
    assert results == [True]


def test_backoff():
    """Pauses double from one second and stay at thirty."""
    assert list(itertools.islice(pump_module.backoff(), 8)) == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_coroutine_that_returns_a_stream(bridge, until):
    """subscribe_events may also be a plain coroutine function returning an async iterator."""
    seen = []

    async def stream():
        yield 1

    async def subscribe():
        return stream()

    bridge.pump(subscribe, seen.append, "events")
    until(lambda: seen == [1])


def test_a_full_queue_does_not_stall_the_siblings(bridge, backend, until):
    """While 50,000 ready items are drained, siblings get their turns again and again."""
    seen, turns, over = [], [], []

    async def stream():
        for number in range(50_000):
            yield number

    def sibling():
        while not over:
            turns.append(len(seen))
            backend.sleep(0)

    task = backend.spawn(sibling, name="sibling")
    bridge.pump(stream, seen.append, "events")
    until(lambda: len(seen) == 50_000)
    over.append(1)
    assert task.join(5)
    if backend.name != "threads":  # threads get their turns from the operating system, ours or not
        assert len({turn for turn in turns if 0 < turn < 50_000}) >= 5
