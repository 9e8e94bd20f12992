"""Positions of greenlets, threads and coroutines in the code."""

import asyncio
import gc
import sys
import threading
import time
import weakref
from types import ModuleType

import pytest

from z4j_bare.concurrency.stacks import (
    HeapScan,
    Position,
    innermost_user_code,
    read_coroutine,
    read_stack,
    text_of,
)

#: The directory of the installed packages.
INSTALLED = next(path for path in sys.path if path.endswith("site-packages"))


def at(module, function, file="/srv/shop/pay.py"):
    return Position(file, 8, module, function, ())


def test_stack_has_positions_and_names_without_values():
    """A stack lists file, line, function and names of locals, innermost first."""
    secret = object()
    first, second, *_ = read_stack(sys._getframe())
    assert first.function == "test_stack_has_positions_and_names_without_values"
    assert (first.module, first.file) == (__name__, __file__)
    assert "secret" in first.names
    assert secret not in first
    assert second.function != first.function


def test_read_keeps_no_object_alive():
    """A local value is freed when its function ends, although the stack was read before."""

    class Value:
        pass

    positions = []

    def use():
        value = Value()
        positions.extend(read_stack(sys._getframe()))
        return weakref.ref(value)

    assert use()() is None
    assert positions


@pytest.mark.parametrize(
    ("callees", "waiting"),
    [
        ([], ""),
        ([at("gevent.hub", "sleep")], "time.sleep"),
        ([at("eventlet.greenthread", "sleep")], "time.sleep"),
        ([at("gevent._socket3", "socket.recv")], "socket.recv"),
        (
            [at("eventlet.hubs", "trampoline"), at("eventlet.greenio.base", "GreenSocket.recv")],
            "socket.recv",
        ),
        (
            [
                at("gevent._socket3", "socket.recv"),
                at("requests.api", "get", f"{INSTALLED}/requests/api.py"),
            ],
            "requests.get (socket.recv)",
        ),
        ([at("threading", "Lock.acquire", threading.__file__)], "Lock.acquire"),
        (
            [
                at("gevent.subprocess", "Popen._gevent_result_wait"),
                at("gevent.subprocess", "Popen.wait"),
                at("gevent.subprocess", "run"),
            ],
            "subprocess.run (Popen.wait)",
        ),
        ([at("eventlet.green.subprocess", "run")], "subprocess.run"),
        ([at("shop.driver", "_recv", f"{INSTALLED}/shop/driver.py")], "shop._recv"),
    ],
)
def test_innermost_user_code_names_the_wait(callees, waiting):
    """The wait is the function that the user's code has called, and the innermost function."""
    stack = [*callees, at("shop.pay", "charge"), at("celery.app.trace", "trace_task")]
    index, found = innermost_user_code(stack)
    assert (stack[index].function, found) == ("charge", waiting)


def test_task_of_installed_package_is_user_code():
    """If no frame lies outside the libraries, a frame of the task's own package is chosen."""
    stack = [
        at("json.decoder", "decode", f"{INSTALLED}/json/decoder.py"),
        at("shop.pay", "charge", f"{INSTALLED}/shop/pay.py"),
        at("celery.app.trace", "trace_task", f"{INSTALLED}/celery/app/trace.py"),
    ]
    index, _ = innermost_user_code(stack, "shop")
    assert stack[index].function == "charge"
    index, _ = innermost_user_code(stack[2:])
    assert index == -1


def test_path_is_relative_to_sys_path(monkeypatch):
    """A position is shown relative to the longest directory of ``sys.path`` that contains it."""
    monkeypatch.setattr(sys, "path", ["/srv", "/srv/app", ""])
    assert text_of(at("shop.pay", "charge", "/srv/app/shop/pay.py")) == "shop/pay.py:8 in charge"


def test_coroutine_shows_what_it_awaits():
    """The positions of a suspended coroutine end with the innermost awaited coroutine."""

    async def inner():
        await asyncio.sleep(0)

    async def outer():
        await inner()

    coroutine = outer()
    coroutine.send(None)
    functions = [each.function.rpartition(".")[2] for each in read_coroutine(coroutine)]
    assert functions[-2:] == ["inner", "outer"]
    coroutine.close()
    assert read_coroutine(coroutine) == []


def test_frame_reader_finds_waiting_context(backend, until):
    """The frame of a task that waits is found by its context, and no frame after its end."""
    get_context, event, contexts = backend.context_getter(), backend.event(), []

    def wait_for_event():
        contexts.append(get_context())
        backend.wait(event)

    task = backend.spawn(wait_for_event, name="waiting")
    until(lambda: contexts)
    until(
        lambda: any(
            each.function.endswith("wait_for_event")
            for each in read_stack(backend.frame_reader()(contexts[0]))
        )
    )
    event.set()
    until(lambda: not task.alive())
    until(lambda: backend.frame_reader()(contexts[0]) is None)


def test_scan_finds_coroutines_of_context(backend, until):
    """The stacks of a loop's tasks are found by the thread or greenlet that runs the loop."""
    get_context, contexts, loops = backend.context_getter(), [], []

    async def pause():
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(60)

    def run():
        contexts.append(get_context())
        try:
            backend.call_blocking(asyncio.run, pause())
        except asyncio.CancelledError:
            pass

    task = backend.spawn(run, name="loop")
    until(lambda: loops)
    scan = HeapScan()
    until(lambda: (scan.run(), scan.coroutines(contexts[0]))[1])
    (stack, *_) = scan.coroutines(contexts[0])
    assert any(each.function.endswith("pause") for each in stack)
    loops[0].call_soon_threadsafe(lambda: [each.cancel() for each in asyncio.all_tasks(loops[0])])
    until(lambda: not task.alive())


def test_scan_finds_spawned_greenlets(mode):
    """A greenlet of gevent is found by the greenlet that has spawned it."""
    if mode != "gevent":
        pytest.skip("only gevent records which greenlet has spawned another one")
    import gevent

    child = gevent.spawn(time.sleep, 60)
    gevent.sleep(0)
    scan = HeapScan()
    scan.run()
    assert child in list(scan.children(gevent.getcurrent()))
    child.kill()


def test_scan_runs_no_code_of_found_objects():
    """The scan does not read ``__class__``, which can run code of the host."""

    class Proxy:
        @property
        def __class__(self):
            raise AssertionError("the scan ran code of the host")

    proxies = [Proxy(), ModuleType("unused")]
    HeapScan().run()
    assert len(proxies) == 2
    gc.collect()
