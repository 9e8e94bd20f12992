"""The loop that the host never sees."""

import asyncio
import logging
import os
import signal
import subprocess
import sys

import pytest

from z4j_bare.asyncio_bridge.hubloop import HubLoop
from z4j_bare.asyncio_bridge.marks import LONGEST_PARK, StepScopedSelector


@pytest.fixture
def loop(backend):
    made = HubLoop(backend)
    made.start()
    yield made
    assert made.shutdown(5)


class Samples:
    """A sibling task that looks for a running loop whenever it gets to run."""

    def __init__(self, backend):
        self.taken = self.leaks = 0
        self._backend = backend
        self._over = False
        self._task = backend.spawn(self._run, name="sampler")

    def _run(self):
        hooks = sys.get_asyncgen_hooks()
        while not self._over:
            self.taken += 1
            self.leaks += (
                asyncio._get_running_loop() is not None or sys.get_asyncgen_hooks() != hooks
            )
            self._backend.sleep(0)

    def end(self):
        self._over = True
        assert self._task.join(5)
        return self.leaks


async def offload(function, *args, timeout=5.0):  # noqa: ASYNC109 - the adapters' own shape
    """What the six ``_offload.py`` of the adapters do."""
    loop = asyncio.get_running_loop()
    return await asyncio.wait_for(loop.run_in_executor(object(), function, *args), timeout)


def test_importing_loads_no_asyncio():
    """Neither the package nor its rooms load asyncio, ssl or a green runtime before a loop is needed."""
    code = (
        "import sys, z4j_bare, z4j_bare.asyncio_bridge, z4j_bare.asyncio_bridge.bridge, z4j_bare.asyncio_bridge.worker_pool;"
        "sys.exit(sum(name in sys.modules for name in ('asyncio', 'gevent', 'eventlet')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_siblings_never_see_a_running_loop(bridge, backend):
    """A sibling sampling at every chance sees neither the mark nor the hooks during calls, offloads, timers, agens."""

    async def work(number):
        async def numbers():
            yield number
            await asyncio.sleep(0.001)
            yield number

        await asyncio.sleep(0)
        await offload(backend.sleep, 0.001)
        return [item async for item in numbers()]

    samples = Samples(backend)
    for number in range(100):
        assert bridge.call(work, number, timeout=5) == [number, number]
    assert samples.end() == 0
    assert samples.taken > 100
    assert asyncio._get_running_loop() is None


def test_logging_inside_a_step_may_switch(loop, backend, until):
    """An error in a callback is logged with the mark off, though the handler lets every sibling run."""

    class Sleepy(logging.Handler):
        def emit(self, record):
            backend.sleep(0.01)
            seen.append(asyncio._get_running_loop())

    seen, handler = [], Sleepy()
    logger = logging.getLogger("asyncio")
    logger.addHandler(handler)
    samples = Samples(backend)
    try:
        loop.call_soon_threadsafe(divmod, 1, 0)
        until(lambda: seen)
    finally:
        logger.removeHandler(handler)
    assert seen == [None]
    assert samples.end() == 0


def test_asyncio_run_works_in_a_sibling(bridge, backend):
    """Users' own loops run to their end beside the bridge and always find themselves running."""
    finished, wrong = [], []

    async def program():
        mine = asyncio.get_running_loop()
        for _ in range(5):
            await asyncio.sleep(0.001)
            if asyncio.get_running_loop() is not mine:
                wrong.append(asyncio.get_running_loop())

    def user():
        for _ in range(20):
            asyncio.run(program())
            finished.append(1)

    async def adapter():
        await asyncio.sleep(0.001)
        return await offload(int)

    task = backend.spawn(user, name="user")
    while not task.join(0):
        assert bridge.call(adapter, timeout=5) == 0
    assert (len(finished), wrong) == (20, [])


def test_call_inside_a_running_user_loop(bridge):
    """A user's coroutine may start the bridge and wait for a call; its own loop is the running one afterwards."""

    async def adapter():
        await asyncio.sleep(0.001)
        return asyncio.get_running_loop()

    async def user():
        mine = asyncio.get_running_loop()
        theirs = bridge.call(adapter, timeout=5)
        await asyncio.sleep(0.001)
        return mine is asyncio.get_running_loop(), theirs is bridge.loop(), theirs is mine

    assert asyncio.run(user()) == (True, True, False)


def test_offload_runs_where_no_loop_is_visible(bridge):
    """The given executor is ignored; the function runs on a worker and sees no loop; errors come back."""
    assert bridge.call(offload, asyncio._get_running_loop, timeout=5) is None
    with pytest.raises(ZeroDivisionError):
        bridge.call(offload, divmod, 1, 0, timeout=5)


def test_offload_times_out_honestly(bridge, backend, until):
    """A hung offload raises TimeoutError inside the adapter at its own deadline, and the worker stays counted."""
    release = backend.event()

    async def adapter():
        try:
            await offload(release.wait, 20, timeout=0.5)
        except TimeoutError:
            return "indeterminate"

    assert bridge.call(adapter, timeout=5) == "indeterminate"
    assert bridge.busy == 1
    release.set()
    until(lambda: bridge.busy == 0)


def test_eight_offloads_run_at_once(bridge, backend):
    """Eight offloads that wait for one another all get a worker."""
    arrived, everyone = [], backend.event()

    def meet():
        arrived.append(1)
        if len(arrived) == 8:
            everyone.set()
        return everyone.wait(5)

    async def adapter():
        return await asyncio.gather(*(offload(meet) for _ in range(8)))

    assert bridge.call(adapter, timeout=10) == [True] * 8


def test_an_abandoned_offload_never_begins(bridge, backend, until):
    """Offloads that time out in the queue of a hung pool are not run when it recovers."""
    release, ran = backend.event(), []

    async def adapter():
        hung = [asyncio.ensure_future(offload(release.wait, 20)) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await offload(ran.append, 1, timeout=0.05)
        release.set()
        await asyncio.gather(*hung)

    bridge.call(adapter, timeout=10)
    until(lambda: bridge.busy == 0)
    assert ran == []


def test_a_system_exit_in_a_step_does_not_end_the_loop(loop, until, caplog):
    """An adapter's sys.exit() costs a restart that is counted and logged; later callbacks run."""
    ran = []
    loop.call_soon_threadsafe(sys.exit, 1)
    loop.call_soon_threadsafe(ran.append, 1)
    until(lambda: ran)
    assert loop.restarts == 1
    assert "goes on" in caplog.text


def test_a_long_chain_of_steps_gives_way(loop, backend, until):
    """A loop that is never out of work lets siblings run every few milliseconds."""
    over = []

    def spin():
        if not over:
            loop.call_soon(spin)

    samples = Samples(backend)
    loop.call_soon_threadsafe(spin)
    before = samples.taken
    until(lambda: samples.taken > before + 20)
    over.append(1)
    assert samples.end() == 0


def test_streams_and_timers_work(bridge):
    """Sockets, name resolution and timers work as on any selector loop."""

    async def adapter():
        async def echo(reader, writer):
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(echo, "localhost", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("localhost", port)
        writer.write(b"hello\n")
        line = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        server.close()
        return line

    assert bridge.call(adapter, timeout=10) == b"HELLO\n"


def test_a_quiet_foreign_put_is_seen_within_a_park(loop, backend, until):
    """A call_soon from outside, which wakes nobody, is run when the park ends: a second later at most."""
    ran = []
    backend.sleep(0.05)
    loop.call_soon(ran.append, 1)
    until(lambda: ran, 3)


def test_a_call_between_two_parks_is_not_lost(backend):
    """A call that comes after the loop looked at its queue and before it parks keeps it from parking."""
    scope = StepScopedSelector(backend)
    asked = []
    scope._inner.close()
    scope._inner = type("Inner", (), {"select": lambda _, timeout: asked.append(timeout) or []})()
    assert not scope.needs_waking()
    assert scope.select(None) == []
    assert asked == [0]
    scope._give_way_at = 0
    assert scope.select(None) == []
    assert scope.select(0.25) == []
    assert asked == [0, LONGEST_PARK, 0.25]


def test_shutdown_cancels_and_later_calls_are_dropped(backend):
    """Shutdown is bounded and idempotent; tasks see their cancellation; late calls neither raise nor run."""
    loop, seen = HubLoop(backend), []
    loop.start()

    async def patient():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    loop.call_soon_threadsafe(lambda: seen.append(loop.create_task(patient())))
    while not seen:
        backend.sleep(0.01)
    assert loop.shutdown(5)
    assert loop.shutdown(5)
    assert seen[1:] == ["cancelled"]
    assert loop.is_closed()
    assert loop.call_soon_threadsafe(seen.append, "late").cancelled()
    assert loop.dropped == 1
    assert "late" not in seen
    assert loop not in HubLoop._alive


def test_shutdown_is_bounded_with_a_task_that_will_not_die(backend, caplog):
    """A coroutine that swallows its cancellation is left behind after the time-out, without a word."""
    loop = HubLoop(backend)
    loop.start()

    async def stubborn():
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    tasks = []
    loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(stubborn())))
    while not tasks:
        backend.sleep(0.01)
    began = backend.now()
    assert loop.shutdown(0.4)
    assert backend.now() - began < 2
    tasks.clear()
    assert caplog.text == ""


def test_signal_handlers_are_refused(loop):
    """No adapter may install a signal handler in the host through our loop."""
    with pytest.raises(NotImplementedError):
        loop.add_signal_handler(signal.SIGTERM, print)


def test_debug_mode_stays_off(backend, monkeypatch):
    """PYTHONASYNCIODEBUG does not reach our loop: its origin tracking would be the host's too."""
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    loop = HubLoop(backend)
    assert not loop.get_debug()
    loop.close()


def test_waking_writes_once_per_park(loop, backend, monkeypatch, until):
    """A thousand calls while the loop is parked cost one write to the self-pipe."""
    writes, ran = [], []
    monkeypatch.setattr(
        asyncio.SelectorEventLoop, "_write_to_self", lambda _: writes.append(os.getpid())
    )
    until(lambda: loop._scope._parked)
    for number in range(1000):
        loop.call_soon_threadsafe(ran.append, number)
    monkeypatch.undo()
    loop._csock.send(b"\0")
    until(lambda: len(ran) == 1000)
    if backend.name != "threads":  # threads may wake in between for reasons of their own
        assert len(writes) == 1
