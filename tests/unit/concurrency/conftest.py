"""Fixtures for the tests of the backends."""

import os
import socket

import pytest


@pytest.fixture
def native_read(mode):
    """The unpatched ``os.read``, which blocks the native thread that calls it."""
    if mode == "gevent":
        from gevent.monkey import get_original

        return get_original("os", "read")
    if mode == "eventlet":
        from eventlet.patcher import original

        return original("os").read
    return os.read


@pytest.fixture
def gate():
    """A pipe to block on: ``(read end, release)``; ``release()`` writes to it."""
    read, write = os.pipe()
    yield read, lambda: os.write(write, b"x")
    os.close(read)
    os.close(write)


@pytest.fixture
def pair():
    """Two connected sockets."""
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()
