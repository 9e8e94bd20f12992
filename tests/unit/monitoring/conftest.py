"""Fixtures for the tests of the control server and of its clients."""

import pytest

from z4j_bare import control
from z4j_bare.monitoring.control_server import ControlServer


@pytest.fixture
def serve(backend, until):
    """``serve(adapter, **responses)``: a control server that runs until the end of the test."""
    stop_event, running = backend.event(), []

    def start(adapter="bare", **responses):
        server = ControlServer(
            adapter,
            {verb: lambda response=response: response for verb, response in responses.items()},
            backend,
        )
        running.append((server, backend.spawn(server.run, stop_event, name="control")))
        until(lambda: server._listener)
        return server

    yield start
    stop_event.set()
    for server, task in running:
        server.wake()
        assert task.join(10)
    assert control.list_clients() == []
