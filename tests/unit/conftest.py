"""Fixtures of several packages: a bridge to the adapters' loop, and a scripted brain."""

import pytest

from tests.support.peer import Peer
from z4j_bare.asyncio_bridge.bridge import Bridge


@pytest.fixture(autouse=True)
def temporary_directory(monkeypatch, tmp_path):
    """Put the replacement of an unusable home into the directory of the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("z4j_bare.home.SHARED_TEMPORARY_DIRECTORIES", ())


@pytest.fixture
def bridge(backend):
    """A bridge of this mode, stopped at the end."""
    made = Bridge(backend)
    yield made
    made.stop(5)


@pytest.fixture
def peer(backend):
    """A peer that listens, stopped at the end."""
    made = Peer(backend)
    yield made
    made.stop()
