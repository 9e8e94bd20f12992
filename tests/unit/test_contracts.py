"""``verifyObject`` of every implementation of an interface."""

import pytest
from zope.interface.verify import verifyObject

from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.buffer import BufferStore, MemoryStore
from z4j_bare.buffer.open_runs import OpenRuns
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.events.ring import Ring
from z4j_bare.interfaces import (
    IBridge,
    IConcurrency,
    IEvent,
    ILock,
    IOpenRuns,
    IStore,
    ITask,
    ITransport,
)
from z4j_bare.settings import load_settings
from z4j_bare.transport.auto import TransportFactory


@pytest.fixture(params=["real", "fake"])
def either(request, backend):
    """The backend of this mode, and the one with virtual time."""
    return backend if request.param == "real" else FakeConcurrency()


def test_backend_implements_interface(either):
    """The backend of every mode implements ``IConcurrency``."""
    assert verifyObject(IConcurrency, either)


def test_task_implements_interface(either):
    """``spawn`` returns an ``ITask``."""
    task = either.spawn(int, name="t")
    assert verifyObject(ITask, task)
    assert task.join(5)


def test_event_implements_interface(either):
    """``event`` returns all of ``IEvent``. gevent's class does not declare it."""
    assert verifyObject(IEvent, either.event(), tentative=True)


def test_lock_implements_interface(either):
    """``lock`` returns an ``ILock`` that can be entered and left."""
    lock = either.lock()
    assert verifyObject(ILock, lock)
    with lock:
        pass


def test_store_implements_interface(tmp_path):
    """The store on disk and the store in memory implement ``IStore``."""
    store = BufferStore(tmp_path / "home" / "store.sqlite")
    assert verifyObject(IStore, store)
    store.close()
    assert verifyObject(IStore, MemoryStore())


def test_open_runs_implement_interface(backend):
    """The mapped file of open runs implements ``IOpenRuns``."""
    assert verifyObject(IOpenRuns, OpenRuns(Ring(1, 1, backend.event())))


def test_transport_implements_interface(backend):
    """Every transport implements ``ITransport``."""
    factory = TransportFactory(
        "http://127.0.0.1:1", "auto", str, load_settings(), backend, dev_mode=False
    )
    for transport in (factory.create(), factory.websocket(), factory.longpoll()):
        assert verifyObject(ITransport, transport)


def test_bridge_implements_interface(backend):
    """The bridge implements ``IBridge``."""
    bridge = Bridge(backend)
    assert verifyObject(IBridge, bridge)
    bridge.stop()
