"""Forked children: greenlets are copied into them, threads are not; either way the copies keep still."""

import asyncio
import os
import select
import time
import warnings

from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.asyncio_bridge.marks import LONGEST_PARK
from z4j_bare.errors import ForkedChildError


def in_child(check):
    """Fork; run ``check`` in the child and return what it returned there, as the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # CPython 3.12 warns of any fork beside threads
        pid = os.fork()
    if not pid:
        code = 99
        try:
            code = check()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def offload(function, *args):
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def awaiting():
    await asyncio.sleep(0.001)
    return asyncio.get_running_loop()


def test_the_copy_leaves_silently_and_the_parent_goes_on(bridge, backend, until, capfd):
    """In a child no step runs, late calls drop, nothing is printed; the parent's timers and calls keep going."""
    loop, ticks, late = bridge.loop(), [], []

    def tick():
        ticks.append(os.getpid())
        loop.call_later(0.005, tick)

    loop.call_soon_threadsafe(tick)
    until(lambda: len(ticks) > 3)
    parent = os.getpid()

    def check():
        refused = loop.call_soon_threadsafe(late.append, 1).cancelled()
        time.sleep(0.2)  # patched: copies get their chance
        bridge.stop()
        return (
            (os.getpid() in ticks)
            + 2 * bool(late)
            + 4 * (not refused)
            + 8 * (asyncio._get_running_loop() is not None)
        )

    for _ in range(3):
        assert in_child(check) == 0
        before = len(ticks)
        assert bridge.call(awaiting, timeout=5) is loop
        assert bridge.call(offload, int, timeout=5) == 0
        assert bridge.call(int, timeout=5) == 0
        until(lambda before=before: len(ticks) > before + 3, 3)
    assert set(ticks) == {parent}
    assert capfd.readouterr().err == ""


def test_a_parked_parent_is_still_woken(bridge, backend, until):
    """Children that let their copies run do not eat the parent's wake-ups: a parked loop answers promptly."""
    loop, slow = bridge.loop(), []
    bridge.call(awaiting, timeout=5)
    for _ in range(5):
        until(lambda: loop._scope._parked)
        assert in_child(lambda: time.sleep(0.05) or 0) == 0
        began = backend.now()
        bridge.call(awaiting, timeout=5)
        slow.append(backend.now() - began)
    assert sorted(slow)[2] < 0.5


def test_the_parent_is_served_while_the_child_lives(bridge, backend):
    """A child that lives on beside the parent may delay a call by one park (eventlet shares its epoll set), no more."""
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
        assert backend.now() - began < 2 * LONGEST_PARK
        backend.sleep(0.01)
    os.close(writer)
    assert task.join(10)
    os.close(reader)
    assert codes == [0]


def test_queued_offloads_do_not_run_twice(bridge, backend, until, tmp_path):
    """Jobs queued at the moment of the fork run in the parent only."""
    release, trace = backend.event(), tmp_path / "trace"

    def job(number):
        with trace.open("a") as file:
            file.write(f"{os.getpid()} {number}\n")

    async def adapter():
        await asyncio.gather(
            *(offload(release.wait, 20) for _ in range(8)), *(offload(job, n) for n in range(5))
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


def test_calls_in_a_child_leave(bridge):
    """A copied agent loop that calls the bridge is told to leave; stop there touches nothing."""
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


def test_a_child_builds_its_own(bridge, backend, mode):
    """A new backend and bridge in a child work, with the parent's still there and alive in the parent."""
    from z4j_bare.concurrency import build

    bridge.call(awaiting, timeout=5)

    def check():
        own = Bridge(build(mode))
        loop = own.call(awaiting, timeout=5)
        value = own.call(offload, int, timeout=5)
        own.stop(5)
        return 0 if loop is not bridge._loop and value == 0 and loop.is_closed() else 1

    assert in_child(check) == 0
    assert bridge.call(awaiting, timeout=5) is bridge.loop()
