"""What every test may ask for: the seam of the mode the suite runs in, and a wait that has a deadline."""

import os
import time

import pytest

from z4j_bare.concurrency import build, choose, detect


@pytest.fixture(scope="session")
def mode():
    """The patching mode of this run: threads, gevent or eventlet."""
    return os.environ.get("Z4J_TEST_MODE", "threads")


@pytest.fixture
def seam(mode):
    """The real seam of this mode, as the agent itself would choose it."""
    chosen = choose("auto", detect())
    assert chosen == mode
    found = build(chosen)
    yield found
    found.close()


@pytest.fixture
def until(seam):
    """``until(condition)``: wait for it cooperatively, at most 10 seconds, and return its value."""

    def wait(condition, seconds=10.0):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "the condition never came true"
            seam.sleep(0.01)
        return value

    return wait


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting of the developer's own reaches a test, and state goes to the test's own directory."""
    for name in [name for name in os.environ if name.startswith("Z4J_") and name != "Z4J_TEST_MODE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "home"))
