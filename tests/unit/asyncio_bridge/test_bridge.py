"""The bridge: calls with deadlines, and pumps."""

import asyncio
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
from z4j_bare.wire.backoff import Backoff


@pytest.fixture
def fast_restarts(monkeypatch):
    """Pumps restart without pauses."""
    monkeypatch.setattr(pump_module, "BACKOFF_INITIAL", 0.001)
    monkeypatch.setattr(pump_module, "BACKOFF_MAX", 0.001)


def test_bridge_implements_interface(bridge):
    """Bridge has the methods of IBridge."""
    assert verifyObject(IBridge, bridge)


def test_await_free_calls_build_no_loop(bridge):
    """Synchronous functions and await-free coroutines run without a loop, which is not built."""

    async def free(value, *, other):
        return value, other, asyncio._get_running_loop()

    assert bridge.call(asyncio._get_running_loop, timeout=5) is None
    assert bridge.call(free, 1, other=2, timeout=5) == (1, 2, None)
    assert bridge._loop is None


def test_timeout_names_function_without_arguments(bridge, backend):
    """The error names the wrapped function, not its arguments: they may be large and secret."""

    def charge(_card):
        return backend.event().wait(5)

    with pytest.raises(TimeoutError, match="charge did not finish") as caught:
        bridge.call(partial(partial(charge), "4111"), timeout=0.05)
    assert "4111" not in str(caught.value)


def test_blocking_call_does_not_block_others(bridge, backend):
    """While an await-free coroutine blocks, other calls return; its own timeout holds."""
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


def test_adapter_error_reaches_the_caller(bridge):
    """An adapter's own exception is raised unchanged, with and without a loop."""

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


def test_timeout_cancels_the_task(bridge, until):
    """A coroutine is cancelled at its deadline, and the loop serves the next call."""
    seen = []

    async def endless():
        seen.append("started")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    # On a busy machine the deadline may pass before the first step; then nothing runs.
    while not seen:
        with pytest.raises(TimeoutError, match="endless"):
            bridge.call(endless, timeout=0.05)
    until(lambda: seen == ["started", "cancelled"])


def test_call_that_expires_before_its_first_step_never_runs(bridge):
    """A coroutine whose deadline passes while the loop is busy has no late side effect."""
    loop, seen = bridge.loop(), []

    async def work():
        seen.append("ran")
        await asyncio.sleep(0)

    def busy():
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            pass  # blocks without switching, as CPU work does

    loop.call_soon_threadsafe(busy)
    with pytest.raises(TimeoutError):
        bridge.call(work, timeout=0.05)

    async def pause():
        await asyncio.sleep(0.01)

    bridge.call(pause, timeout=5)
    assert seen == []


def test_cancelled_coroutine_raises_agent_error(bridge):
    """CancelledError, a BaseException, is converted to AgentError."""

    async def gives_up():
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    with pytest.raises(AgentError):
        bridge.call(gives_up, timeout=5)


def test_system_exit_of_adapter_is_contained(bridge):
    """``sys.exit()`` in an adapter ends neither the adapters' loop nor the calling loop."""

    async def free():
        raise SystemExit(1)

    async def awaiting():
        await asyncio.sleep(0)
        raise SystemExit(1)

    for function in (free, awaiting):
        with pytest.raises(AgentError, match="SystemExit"):
            bridge.call(function, timeout=5)
    assert bridge.call(int, timeout=5) == 0


def test_awaitable_from_sync_function_is_awaited(bridge):
    """A synchronous wrapper runs on a worker, and the awaitable it returns runs on the loop."""

    async def inner():
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    class Awaitable:
        def __await__(self):
            return inner().__await__()

    assert bridge.call(lambda: inner(), timeout=5) is bridge.loop()
    assert bridge.call(Awaitable, timeout=5) is bridge.loop()


def test_loop_is_always_the_same(bridge):
    """``loop()`` returns one object, which also runs the coroutines."""

    async def adapter():
        await asyncio.sleep(0)
        return asyncio.get_running_loop()

    assert bridge.loop() is bridge.loop() is bridge.call(adapter, timeout=5)


def test_concurrent_calls_get_their_own_results(bridge, backend):
    """Fifty tasks that call at once each get their own result."""
    results = []

    async def echo(number):
        await asyncio.sleep(0.001)
        return number

    tasks = [
        backend.spawn(lambda n=n: results.append((n, bridge.call(echo, n, timeout=10))), name="c")
        for n in range(50)
    ]
    assert all(task.join(10) for task in tasks)
    assert sorted(results) == [(n, n) for n in range(50)]


def test_stop_refuses_later_calls(backend):
    """After stop, calls fail at once, a waiting call fails, and late callbacks are dropped."""
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


def test_stop_without_loop_builds_none(backend):
    """A bridge that was never used can be stopped, and builds no loop afterwards."""
    bridge = Bridge(backend)
    bridge.stop()
    with pytest.raises(AgentError):
        bridge.loop()
    with pytest.raises(AgentError):
        bridge.pump(lambda: None, print, "late")


def test_pump_delivers_all_items_in_order(bridge, backend, until):
    """All 20,000 events of four producers arrive in order, and producers see no running loop."""
    loop, seen, visible = bridge.loop(), defaultdict(list), []

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
                visible.append(asyncio._get_running_loop())
                backend.sleep(0)

    stop_pump = bridge.pump(
        adapter.subscribe_events, lambda item: seen[item[0]].append(item[1]), "events"
    )
    tasks = [backend.spawn(produce, name, name=f"producer-{name}") for name in "abcd"]
    assert all(task.join(20) for task in tasks)
    until(lambda: sum(map(len, seen.values())) == 20_000)
    assert all(numbers == list(range(5000)) for numbers in seen.values())
    assert not any(visible)
    stop_pump()
    assert bridge.restarts == 0


def test_stopping_pump_delivers_queued_items(bridge):
    """Items queued before the stop reach the sink; stopping twice, or after the bridge, is safe."""
    loop, seen = bridge.loop(), []
    queue = asyncio.Queue()

    async def stream():
        while True:
            yield await queue.get()

    stop_pump = bridge.pump(stream, seen.append, "events")
    for number in range(3000):
        loop.call_soon_threadsafe(queue.put_nowait, number)
    stop_pump()
    assert seen == list(range(3000))
    stop_pump()
    bridge.stop(5)
    stop_pump()


def test_generator_that_ends_is_not_restarted(bridge, until, fast_restarts):
    """A stream that ends at once is started once."""
    started = []

    async def stream():
        started.append(1)
        return
        yield

    stop_pump = bridge.pump(stream, started.append, "registry")
    until(lambda: started)

    async def pause():
        await asyncio.sleep(0.02)

    bridge.call(pause, timeout=5)
    assert (started, bridge.restarts) == ([1], 0)
    stop_pump()


def test_generator_that_raises_is_restarted(bridge, until, fast_restarts, caplog):
    """A failing stream is logged, counted and restarted, and its later items arrive."""
    attempts, seen = [], []

    async def stream():
        attempts.append(1)
        yield len(attempts)
        if len(attempts) < 4:
            raise LookupError("broken stream")

    with caplog.at_level(logging.WARNING, "z4j.runtime.asyncio_bridge.pump"):
        stop_pump = bridge.pump(stream, seen.append, "events")
        until(lambda: len(seen) == 4)
    assert bridge.restarts == 3
    assert caplog.text.count("events failed") == 3
    stop_pump()


def test_stream_that_cancels_itself_is_restarted(bridge, until, fast_restarts):
    """CancelledError or SystemExit raised by a stream, not by a cancelled pump, is a failure."""
    seen, errors = [], [asyncio.CancelledError, SystemExit]

    async def stream():
        if errors:
            raise errors.pop()
        yield 1

    bridge.pump(stream, seen.append, "events")
    until(lambda: seen == [1])
    assert bridge.restarts == 2


def test_call_from_loop_step_is_refused(bridge):
    """A loop step that calls the bridge gets an error, not a deadlock."""

    async def call_again():
        await asyncio.sleep(0)
        with pytest.raises(AgentError, match="wait for its own loop"):
            bridge.call(int, timeout=5)
        return 1

    assert bridge.call(call_again, timeout=5) == 1


def test_switching_step_does_not_affect_other_callers(bridge, backend, until):
    """While an adapter's step switches, calls of other tasks are not mistaken for loop steps."""
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


def test_backoff_doubles_up_to_thirty_seconds():
    """Pauses double from one second and stay at thirty."""
    delays = Backoff(pump_module.BACKOFF_INITIAL, pump_module.BACKOFF_MAX)
    assert [delays.next() for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, 30]


def test_pump_accepts_coroutine_that_returns_a_stream(bridge, until):
    """``subscribe_events`` may be a coroutine function that returns an async iterator."""
    seen = []

    async def stream():
        yield 1

    async def subscribe():
        return stream()

    bridge.pump(subscribe, seen.append, "events")
    until(lambda: seen == [1])


def test_full_queue_does_not_block_other_tasks(bridge, backend, until):
    """While 50,000 ready items are delivered, another task runs at least five times."""
    seen, samples, over = [], [], []

    async def stream():
        for number in range(50_000):
            yield number

    def other_task():
        while not over:
            samples.append(len(seen))
            backend.sleep(0)

    task = backend.spawn(other_task, name="other")
    bridge.pump(stream, seen.append, "events")
    until(lambda: len(seen) == 50_000)
    over.append(1)
    assert task.join(5)
    if backend.name != "threads":  # the operating system schedules threads, whatever the pump does
        assert len({sample for sample in samples if 0 < sample < 50_000}) >= 5
