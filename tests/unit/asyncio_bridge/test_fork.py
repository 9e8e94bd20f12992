"""The bridge in forked children: the copies of its greenlets must not run."""

import asyncio
import os
import select
import time
import warnings

from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.asyncio_bridge.hubloop import MAX_WAIT
from z4j_bare.errors import ForkedChildError


def in_child(check):
    """Fork, call ``check`` in the child, and return its value, which is the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # CPython 3.12 warns about a fork while threads run
        pid = os.fork()
    if not pid:
        code = 99
        try:
            code = check()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def in_executor(function, *args):
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def awaiting():
    await asyncio.sleep(0.001)
    return asyncio.get_running_loop()


def test_copy_in_child_stays_silent_and_parent_continues(bridge, backend, until, capfd):
    """In a child no step runs and nothing is printed; the parent's timers and calls continue."""
    loop, ticks, late = bridge.loop(), [], []

    def tick():
        ticks.append(os.getpid())
        loop.call_later(0.005, tick)

    loop.call_soon_threadsafe(tick)
    until(lambda: len(ticks) > 3)
    parent = os.getpid()

    def check():
        dropped = loop.call_soon_threadsafe(late.append, 1).cancelled()
        time.sleep(0.2)  # patched: lets the copies run
        bridge.stop()
        return (
            (os.getpid() in ticks)
            + 2 * bool(late)
            + 4 * (not dropped)
            + 8 * (asyncio._get_running_loop() is not None)
        )

    for _ in range(3):
        assert in_child(check) == 0
        before = len(ticks)
        assert bridge.call(awaiting, timeout=5) is loop
        assert bridge.call(in_executor, int, timeout=5) == 0
        assert bridge.call(int, timeout=5) == 0
        until(lambda before=before: len(ticks) > before + 3, 3)
    assert set(ticks) == {parent}
    assert capfd.readouterr().err == ""


def test_waiting_parent_is_still_woken(bridge, backend, until):
    """A child does not take the parent's wake-ups: a waiting loop in the parent reacts promptly."""
    loop, slow = bridge.loop(), []
    bridge.call(awaiting, timeout=5)
    for _ in range(5):
        until(lambda: loop._scope._waiting)
        assert in_child(lambda: time.sleep(0.05) or 0) == 0
        began = backend.now()
        bridge.call(awaiting, timeout=5)
        slow.append(backend.now() - began)
    assert sorted(slow)[2] < 0.5


def test_living_child_delays_parent_by_one_wait_at_most(bridge, backend):
    """While a child lives, a call takes at most two waits: eventlet shares its epoll set."""
    loop = bridge.loop()
    bridge.call(awaiting, timeout=5)
    reader, writer = os.pipe()

    def check():
        os.close(writer)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.01)
            if select.select([reader], [], [], 0)[0]:
                return 0
        return 1

    codes = []
    task = backend.spawn(lambda: codes.append(in_child(check)), name="fork")
    for _ in range(5):
        began = backend.now()
        assert bridge.call(awaiting, timeout=5) is loop
        assert backend.now() - began < 2 * MAX_WAIT
        backend.sleep(0.01)
    os.close(writer)
    assert task.join(10)
    os.close(reader)
    assert codes == [0]


def test_queued_executor_calls_run_once(bridge, backend, until, tmp_path):
    """Jobs that are queued during the fork run only in the parent."""
    release, trace = backend.event(), tmp_path / "trace"

    def job(number):
        with trace.open("a") as file:
            file.write(f"{os.getpid()} {number}\n")

    async def adapter():
        await asyncio.gather(
            *(in_executor(release.wait, 20) for _ in range(8)),
            *(in_executor(job, n) for n in range(5)),
        )

    task = backend.spawn(lambda: bridge.call(adapter, timeout=20), name="caller")
    until(lambda: bridge.busy == 8)

    def check():
        release.set()
        time.sleep(0.1)
        return 0

    assert in_child(check) == 0
    release.set()
    assert task.join(5)
    assert sorted(trace.read_text().split("\n")) == [
        "",
        *sorted(f"{os.getpid()} {n}" for n in range(5)),
    ]


def test_call_in_child_raises_forked_child_error(bridge):
    """A call in a child raises ForkedChildError, and stop does nothing there."""
    bridge.call(awaiting, timeout=5)

    def check():
        for function in (int, awaiting):
            try:
                bridge.call(function, timeout=5)
            except ForkedChildError:
                continue
            return 1
        bridge.stop()
        return 2 if bridge.loop().is_closed() else 0

    assert in_child(check) == 0
    assert bridge.call(int, timeout=5) == 0


def test_child_can_build_its_own_bridge(bridge, backend, mode):
    """A new backend and bridge work in a child, and the parent's bridge keeps working."""
    from z4j_bare.concurrency import build

    bridge.call(awaiting, timeout=5)

    def check():
        own = Bridge(build(mode))
        loop = own.call(awaiting, timeout=5)
        value = own.call(in_executor, int, timeout=5)
        own.stop(5)
        return 0 if loop is not bridge._loop and value == 0 and loop.is_closed() else 1

    assert in_child(check) == 0
    assert bridge.call(awaiting, timeout=5) is bridge.loop()
