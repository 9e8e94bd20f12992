"""Fixtures for all tests: backend, wait with timeout, step limit, environment, certificates."""

import os
import ssl
import time
from importlib import import_module

import pytest
from hypothesis import settings

from tests.support import parts
from tests.support.certificates import make
from tests.support.steps import StepLimitChecker
from z4j_bare import runtime
from z4j_bare.concurrency import build, choose, detect

# No deadline, because a busy machine can delay any example.
settings.register_profile("z4j", deadline=None)
settings.load_profile("z4j")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return parts.fail_if_required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return parts.fail_if_required((yield))


@pytest.fixture(scope="session")
def mode():
    """The patching mode of this run: threads, gevent or eventlet."""
    return os.environ.get("Z4J_TEST_MODE", "threads")


@pytest.fixture
def backend(mode):
    """The backend that the agent chooses in this mode."""
    chosen = choose("auto", detect())
    assert chosen == mode
    found = build(chosen)
    yield found
    found.close()


@pytest.fixture
def until(backend):
    """``until(condition)``: wait cooperatively, at most 30 s, and return the condition's value."""

    def wait(condition, seconds=30.0):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "timeout: the condition is still false"
            backend.sleep(0.01)
        return value

    return wait


@pytest.fixture(autouse=True)
def step_limit(mode, monkeypatch):
    """Fail a test in which a step of a started agent blocks the hub for too long.

    In threads mode there is no hub, so nothing is checked.
    """
    if mode == "threads":
        yield None
        return
    if mode == "eventlet":
        # In eventlet an import blocks the hub. Imported in a step, these would exceed the limit.
        import_module("z4j_bare.transport.http")
        import_module("z4j_bare.asyncio_bridge.hubloop")
    checker = StepLimitChecker()
    monkeypatch.setattr(runtime, "build", lambda name: checker.watch(build(name)))
    yield checker
    checker.stop()
    if "COVERAGE_RUN" not in os.environ:  # the tracer makes every step longer
        assert not checker.violations, "\n".join(checker.violations)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """Remove the developer's settings, and keep all state in the test's temporary directory."""
    for name in [
        name for name in os.environ if name.startswith("Z4J_") and name != "Z4J_TEST_MODE"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("Z4J_ORCHESTRATED", "0")  # also when the tests run in a container


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 and ``brain.test``."""
    return make(tmp_path_factory.mktemp("tls") / "peer.pem")


@pytest.fixture(scope="session")
def server_tls(certificate):
    """The TLS context of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
