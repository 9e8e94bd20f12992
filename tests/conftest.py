"""What every test may ask for: the backend of the mode the suite runs in, and a wait that has a deadline."""

import os
import ssl
import time
from importlib import import_module

import pytest
from hypothesis import settings

from tests.support.certificates import make
from tests.support.steps import Judge
from z4j_bare import runtime
from z4j_bare.concurrency import build, choose, detect

#: A busy machine stalls any example: no assertion on durations tighter than a hang.
settings.register_profile("z4j", deadline=None)
settings.load_profile("z4j")


@pytest.fixture(scope="session")
def mode():
    """The patching mode of this run: threads, gevent or eventlet."""
    return os.environ.get("Z4J_TEST_MODE", "threads")


@pytest.fixture
def backend(mode):
    """The real backend of this mode, as the agent itself would choose it."""
    chosen = choose("auto", detect())
    assert chosen == mode
    found = build(chosen)
    yield found
    found.close()


@pytest.fixture
def until(backend):
    """``until(condition)``: wait for it cooperatively, at most 30 seconds (a hang, on a busy machine), and return it."""

    def wait(condition, seconds=30.0):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "the condition never came true"
            backend.sleep(0.01)
        return value

    return wait


@pytest.fixture(autouse=True)
def judge(mode, monkeypatch):
    """Fails a test in which a step of a started agent holds the hub too long; in threads nobody waits for our steps."""
    if mode == "threads":
        yield None
        return
    if (
        mode == "eventlet"
    ):  # no import in bites there: the one that comes with the first fallback would be guilty
        import_module("z4j_bare.transport.http")
        import_module("z4j_bare.asyncio_bridge.hubloop")
    judge = Judge()
    monkeypatch.setattr(runtime, "build", lambda name: judge.watch(build(name)))
    yield judge
    judge.stop()
    assert not judge.guilty, "\n".join(judge.guilty)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of the developer's own reaches a test, and state goes to the test's own directory."""
    for name in [
        name for name in os.environ if name.startswith("Z4J_") and name != "Z4J_TEST_MODE"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("Z4J_ORCHESTRATED", "0")  # whoever runs the tests, in whatever container


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 and ``brain.test`` that is its own authority."""
    return make(tmp_path_factory.mktemp("tls") / "peer.pem")


@pytest.fixture(scope="session")
def server_tls(certificate):
    """What a server with that certificate speaks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
