"""Importing the package costs nothing and decides nothing: it may happen before the process is patched."""

import json
import subprocess
import sys

import pytest

FORBIDDEN = (
    "ssl",
    "asyncio",
    "requests",
    "urllib3",
    "websocket",
    "websockets",
    "httpx",
    "gevent",
    "eventlet",
    "celery",
    "sqlite3",
    "z4j_brain",
)


def loaded_by(code):
    """What ``sys.modules`` holds after ``code`` in a fresh interpreter, beyond what z4j_core's own models load."""
    full = f"import sys; before = set(sys.modules)\n{code}\nimport json; print(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run(
        [sys.executable, "-c", full], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(done.stdout))


@pytest.fixture(autouse=True)
def once(mode):
    if mode != "threads":
        pytest.skip("the same sub-processes whatever mode this one is in")


def test_the_import_is_light():
    """``import z4j_bare`` and naming its public entry points load nothing network-related and no runtime."""
    loaded = loaded_by(
        "import z4j_bare; z4j_bare.install_agent, z4j_bare.AgentRuntime, z4j_bare.safe_boundary"
    )
    assert loaded.isdisjoint(FORBIDDEN), loaded.intersection(FORBIDDEN)


def test_the_rooms_are_light():
    """The wire, the loops and the choice of a backend load no library of a runtime either."""
    packages = (
        "concurrency",
        "wire.session",
        "wire.close_codes",
        "pipeline.send",
        "pipeline.session",
        "commands",
        "transport.websocket",
        "control",
        "process",
    )
    loaded = loaded_by("".join(f"import z4j_bare.{package}\n" for package in packages))
    heavy = ("gevent", "eventlet", "requests", "websocket", "celery", "asyncio")
    assert loaded.isdisjoint(heavy), loaded.intersection(heavy)


def test_an_agent_is_no_larger_than_its_worker_needs():
    """An agent without a scheduler loads what it needs to be built, and none of what serves commands, schedules, long-poll, developers or a look from outside."""
    loaded = loaded_by("import z4j_bare.agent")
    unneeded = (
        "schedules.stream",
        "schedules.operations",
        "schedules.host",
        "transport.longpoll",
        "transport.http",
        "buffer.report",
    )
    unneeded += (
        "commands.executor",
        "commands.actions",
        "commands.process_restart",
        "engines.celery.controls",
        "engines.celery.remote_control",
        "watcher",
    )
    assert "z4j_bare.transport.websocket" in loaded
    assert loaded.isdisjoint({f"z4j_bare.{each}" for each in unneeded})


def test_public_names():
    """Everything in ``__all__`` exists, the lazy names included, and an unknown one is an AttributeError."""
    import z4j_bare

    for name in z4j_bare.__all__:
        assert getattr(z4j_bare, name) is not None
    assert z4j_bare.__version__.startswith("1.13")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = z4j_bare.no_such_name


def test_patching_after_the_import_still_works():
    """A process that imports z4j_bare first and patches afterwards is detected as patched."""
    code = (
        "import z4j_bare\nfrom gevent import monkey; monkey.patch_all()\n"
        "from z4j_bare.concurrency import choose, detect; assert choose('auto', detect()) == 'gevent'"
    )
    assert "z4j_bare.concurrency" in loaded_by(code)


def test_without_forks_it_says_so():
    """Where there are no forks, as on Windows, the entry point's import names what is missing and where it works."""
    code = (
        "import os, shutil, sys; del os.fork, os.register_at_fork; sys.modules['posix'] = None\n"
        "import z4j_bare\nz4j_bare.install_agent"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "ImportError: z4j-bare needs a POSIX system" in done.stderr
