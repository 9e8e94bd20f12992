"""Every implementer against its contract in ``interfaces``: names, signatures, attributes."""

import pytest
from zope.interface.verify import verifyObject

from z4j_bare.asyncio_bridge.bridge import Bridge
from z4j_bare.buffer import BufferStore, MemoryStore
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.interfaces import IBridge, IConcurrency, IEvent, ILock, IStore, ITask, ITransport
from z4j_bare.settings import load_settings
from z4j_bare.transport.auto import TransportFactory


@pytest.fixture(params=["real", "fake"])
def either(request, backend):
    """The backend of this mode, and the one with virtual time."""
    return backend if request.param == "real" else FakeConcurrency()


def test_seams(either):
    """The backend of every mode, the fake included, keeps IConcurrency."""
    assert verifyObject(IConcurrency, either)


def test_tasks(either):
    """What spawn returns keeps ITask."""
    task = either.spawn(int, name="t")
    assert verifyObject(ITask, task)
    assert task.join(5)


def test_events(either):
    """What event() returns has all of IEvent; foreign classes cannot declare it, so that is not asked."""
    assert verifyObject(IEvent, either.event(), tentative=True)


def test_locks(either):
    """What lock() returns keeps ILock, and can be entered and left."""
    lock = either.lock()
    assert verifyObject(ILock, lock)
    with lock:
        pass


def test_stores(tmp_path):
    """The store on disk and the store in memory keep IStore."""
    store = BufferStore(tmp_path / "home" / "store.sqlite")
    assert verifyObject(IStore, store)
    store.close()
    assert verifyObject(IStore, MemoryStore())


def test_transports(backend):
    """Every transport keeps ITransport."""
    routes = TransportFactory(
        "http://127.0.0.1:1", "auto", str, load_settings(), backend, dev_mode=False
    )
    for transport in (routes.create(), routes.websocket(), routes.longpoll()):
        assert verifyObject(ITransport, transport)


def test_bridges(backend):
    """The bridge keeps IBridge."""
    bridge = Bridge(backend)
    assert verifyObject(IBridge, bridge)
    bridge.stop()
