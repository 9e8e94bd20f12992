"""The adapters' loop: never visible to the host, cooperative, and bounded at shutdown."""

import asyncio
import logging
import os
import signal
import subprocess
import sys

import pytest

from z4j_bare.asyncio_bridge.hubloop import MAX_WAIT, HubLoop, StepScopedSelector


@pytest.fixture
def loop(backend):
    made = HubLoop(backend)
    made.start()
    yield made
    assert made.shutdown(5)


class Sampler:
    """Another task, which checks for a running loop whenever it runs."""

    def __init__(self, backend):
        self.taken = self.visible = 0
        self._backend = backend
        self._over = False
        self._task = backend.spawn(self._run, name="sampler")

    def _run(self):
        hooks = sys.get_asyncgen_hooks()
        while not self._over:
            self.taken += 1
            self.visible += (
                asyncio._get_running_loop() is not None or sys.get_asyncgen_hooks() != hooks
            )
            self._backend.sleep(0)

    def stop(self):
        self._over = True
        assert self._task.join(5)
        return self.visible


async def in_executor(function, *args, timeout=5.0):  # noqa: ASYNC109 - the adapters' own shape
    """Do what the six ``_offload.py`` modules of the adapters do."""
    loop = asyncio.get_running_loop()
    return await asyncio.wait_for(loop.run_in_executor(object(), function, *args), timeout)


def test_import_loads_no_asyncio():
    """Before a loop is needed, neither asyncio nor a green runtime is imported."""
    code = (
        "import sys, z4j_bare, z4j_bare.asyncio_bridge;"
        "import z4j_bare.asyncio_bridge.bridge, z4j_bare.asyncio_bridge.worker_pool;"
        "sys.exit(sum(name in sys.modules for name in ('asyncio', 'gevent', 'eventlet')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_tasks_never_see_a_running_loop(bridge, backend):
    """Another task sees neither a running loop nor async-generator hooks during calls."""

    async def work(number):
        async def numbers():
            yield number
            await asyncio.sleep(0.001)
            yield number

        await asyncio.sleep(0)
        await in_executor(backend.sleep, 0.001)
        return [item async for item in numbers()]

    sampler = Sampler(backend)
    for number in range(100):
        assert bridge.call(work, number, timeout=5) == [number, number]
    assert sampler.stop() == 0
    assert sampler.taken > 100
    assert asyncio._get_running_loop() is None


def test_logging_in_a_step_hides_the_running_loop(loop, backend, until):
    """An error in a callback is logged without a running loop: the handler may switch."""

    class SwitchingHandler(logging.Handler):
        def emit(self, record):
            backend.sleep(0.01)
            seen.append(asyncio._get_running_loop())

    seen, handler = [], SwitchingHandler()
    logger = logging.getLogger("asyncio")
    logger.addHandler(handler)
    sampler = Sampler(backend)
    try:
        loop.call_soon_threadsafe(divmod, 1, 0)
        until(lambda: seen)
    finally:
        logger.removeHandler(handler)
    assert seen == [None]
    assert sampler.stop() == 0


def test_asyncio_run_works_in_other_tasks(bridge, backend):
    """A user's ``asyncio.run`` works beside the bridge and always sees its own loop."""
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
        return await in_executor(int)

    task = backend.spawn(user, name="user")
    while not task.join(0):
        assert bridge.call(adapter, timeout=5) == 0
    assert (len(finished), wrong) == (20, [])


def test_call_inside_running_user_loop(bridge):
    """A user's coroutine may call the bridge; afterwards its own loop is the running loop."""

    async def adapter():
        await asyncio.sleep(0.001)
        return asyncio.get_running_loop()

    async def user():
        mine = asyncio.get_running_loop()
        adapters = bridge.call(adapter, timeout=5)
        await asyncio.sleep(0.001)
        return mine is asyncio.get_running_loop(), adapters is bridge.loop(), adapters is mine

    assert asyncio.run(user()) == (True, True, False)


def test_coroutine_that_waits_cooperatively_keeps_its_task(bridge, backend):
    """A coroutine waits without ``await`` while the loop runs; both keep their current task."""
    steps, wrong = [], []

    async def check(wait):
        mine = asyncio.current_task(), asyncio.get_running_loop()
        for _ in range(20):
            await asyncio.sleep(0.001)
            wait()
            if (asyncio.current_task(), asyncio.get_running_loop()) != mine:
                wrong.append(mine)
        steps.append(mine[0])

    adapter = backend.spawn(lambda: bridge.call(check, int, timeout=20), name="adapter")
    asyncio.run(check(lambda: backend.sleep(0.002)))
    assert adapter.join(20)
    assert (len(set(steps)), wrong) == (2, [])


def test_executor_call_sees_no_running_loop(bridge):
    """The given executor is ignored; the function runs on a worker, and errors are raised."""
    assert bridge.call(in_executor, asyncio._get_running_loop, timeout=5) is None
    with pytest.raises(ZeroDivisionError):
        bridge.call(in_executor, divmod, 1, 0, timeout=5)


def test_hung_executor_call_times_out(bridge, backend, until):
    """A hung executor call times out in the adapter; its worker stays busy until it ends."""
    release = backend.event()

    async def adapter():
        try:
            await in_executor(release.wait, 20, timeout=0.5)
        except TimeoutError:
            return "indeterminate"

    assert bridge.call(adapter, timeout=5) == "indeterminate"
    assert bridge.busy == 1
    release.set()
    until(lambda: bridge.busy == 0)


def test_eight_executor_calls_run_at_once(bridge, backend):
    """Eight executor calls that wait for one another all get a worker."""
    arrived, everyone = [], backend.event()

    def meet():
        arrived.append(1)
        if len(arrived) == 8:
            everyone.set()
        return everyone.wait(5)

    async def adapter():
        return await asyncio.gather(*(in_executor(meet) for _ in range(8)))

    assert bridge.call(adapter, timeout=10) == [True] * 8


def test_abandoned_executor_call_never_runs(bridge, backend, until):
    """A call that timed out in the queue of a hung pool is not run when a worker is free."""
    release, ran = backend.event(), []

    async def adapter():
        hung = [asyncio.ensure_future(in_executor(release.wait, 20)) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await in_executor(ran.append, 1, timeout=0.05)
        release.set()
        await asyncio.gather(*hung)

    bridge.call(adapter, timeout=10)
    until(lambda: bridge.busy == 0)
    assert ran == []


def test_system_exit_in_a_step_does_not_end_the_loop(loop, until, caplog):
    """An adapter's ``sys.exit()`` is logged and counted as a restart; later callbacks run."""
    ran = []
    loop.call_soon_threadsafe(sys.exit, 1)
    loop.call_soon_threadsafe(ran.append, 1)
    until(lambda: ran)
    assert loop.restarts == 1
    assert "the adapters' loop continues" in caplog.text


def test_busy_loop_yields_to_other_tasks(loop, backend, until):
    """A loop that always has work lets other tasks run every few milliseconds."""
    over = []

    def spin():
        if not over:
            loop.call_soon(spin)

    sampler = Sampler(backend)
    loop.call_soon_threadsafe(spin)
    before = sampler.taken
    until(lambda: sampler.taken > before + 20)
    over.append(1)
    assert sampler.stop() == 0


def test_streams_and_timers_work(bridge):
    """Sockets, name resolution and timers work as on the standard loop."""

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


def test_call_soon_from_another_task_runs_within_max_wait(loop, backend, until):
    """A ``call_soon`` from outside, which does not wake the loop, runs within MAX_WAIT."""
    ran = []
    backend.sleep(0.05)
    loop.call_soon(ran.append, 1)
    until(lambda: ran, 3)


def test_call_before_wait_prevents_waiting(backend):
    """A call after the loop checked its queue and before it waits makes it not wait."""
    scope = StepScopedSelector(backend)
    timeouts = []
    scope._inner.close()
    scope._inner = type(
        "Inner", (), {"select": lambda _, timeout: timeouts.append(timeout) or []}
    )()
    assert not scope.should_wake()
    assert scope.select(None) == []
    assert timeouts == [0]
    scope._yield_at = 0
    assert scope.select(None) == []
    assert scope.select(0.25) == []
    assert timeouts == [0, MAX_WAIT, 0.25]


def test_shutdown_cancels_tasks_and_drops_later_calls(backend):
    """Shutdown is idempotent; tasks are cancelled; later calls neither raise nor run."""
    loop, seen = HubLoop(backend), []
    loop.start()

    async def endless():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    loop.call_soon_threadsafe(lambda: seen.append(loop.create_task(endless())))
    while not seen:
        backend.sleep(0.01)
    assert loop.shutdown(5)
    assert loop.shutdown(5)
    assert seen[1:] == ["cancelled"]
    assert loop.is_closed()
    assert loop.call_soon_threadsafe(seen.append, "late").cancelled()
    assert loop.dropped == 1
    assert "late" not in seen
    assert loop not in HubLoop._in_use


def test_shutdown_is_bounded_with_uncancellable_task(backend, caplog):
    """A coroutine that ignores its cancellation is abandoned at the timeout and not logged."""
    loop = HubLoop(backend)
    loop.start()

    async def uncancellable():
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    tasks = []
    loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(uncancellable())))
    while not tasks:
        backend.sleep(0.01)
    began = backend.now()
    assert loop.shutdown(0.4)
    assert backend.now() - began < 2
    tasks.clear()
    assert caplog.text == ""


def test_signal_handlers_are_refused(loop):
    """An adapter cannot install a signal handler in the host through the loop."""
    with pytest.raises(NotImplementedError):
        loop.add_signal_handler(signal.SIGTERM, print)


def test_debug_mode_stays_off(backend, monkeypatch):
    """PYTHONASYNCIODEBUG has no effect on the loop: its tracking would affect the host."""
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    loop = HubLoop(backend)
    assert not loop.get_debug()
    loop.close()


def test_waking_writes_once_per_wait(loop, backend, monkeypatch, until):
    """A thousand calls while the loop waits cost one write to the self-pipe."""
    writes, ran = [], []
    monkeypatch.setattr(
        asyncio.SelectorEventLoop, "_write_to_self", lambda _: writes.append(os.getpid())
    )
    until(lambda: loop._scope._waiting)
    for number in range(1000):
        loop.call_soon_threadsafe(ran.append, number)
    monkeypatch.undo()
    loop._csock.send(b"\0")
    until(lambda: len(ran) == 1000)
    if backend.name != "threads":  # a thread may wake in between
        assert len(writes) == 1
