"""An import of the package is light and may happen before the process is patched."""

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
    """Return the modules that ``code`` loads in a new interpreter."""
    program = (
        f"import sys; before = set(sys.modules)\n{code}\n"
        "import json; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(done.stdout))


@pytest.fixture(autouse=True)
def only_once(mode):
    """Run these tests in one mode, because their subprocesses are the same in every mode."""
    if mode != "threads":
        pytest.skip("the subprocesses are the same in every mode")


def test_import_loads_no_network_library():
    """``import z4j_bare`` and its public entry points load no network library and no runtime."""
    loaded = loaded_by(
        "import z4j_bare; z4j_bare.install_agent, z4j_bare.AgentRuntime, z4j_bare.safe_boundary"
    )
    assert loaded.isdisjoint(FORBIDDEN), loaded.intersection(FORBIDDEN)


def test_packages_load_no_runtime_library():
    """The wire, the pipeline and the choice of a backend load no library of a runtime."""
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


def test_agent_loads_only_what_its_worker_needs():
    """An agent without a scheduler loads no module that only a rarer case needs.

    Such cases are commands, schedules, long-poll, development, and inspection by a command.
    """
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


def test_public_names_exist():
    """All names in ``__all__`` exist, the lazy ones too; an unknown one is an AttributeError."""
    import z4j_bare

    for name in z4j_bare.__all__:
        assert getattr(z4j_bare, name) is not None
    assert z4j_bare.__version__.startswith("1.13")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = z4j_bare.no_such_name


def test_patch_after_import_is_detected():
    """A process that imports z4j_bare first and patches afterwards is detected as patched."""
    code = (
        "import z4j_bare\nfrom gevent import monkey; monkey.patch_all()\n"
        "from z4j_bare.concurrency import choose, detect\n"
        "assert choose('auto', detect()) == 'gevent'"
    )
    assert "z4j_bare.concurrency" in loaded_by(code)


def test_import_error_names_platform_without_forks():
    """On a platform without forks the error says that z4j-bare needs a POSIX system."""
    code = (
        "import os, shutil, sys; del os.fork, os.register_at_fork; sys.modules['posix'] = None\n"
        "import z4j_bare\nz4j_bare.install_agent"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "ImportError: z4j-bare needs a POSIX system" in done.stderr


@pytest.mark.parametrize(
    ("preference", "module"),
    [("auto", "websocket"), ("ws", "websocket"), ("longpoll", "z4j_bare.transport.longpoll")],
)
def test_transport_library_is_imported_when_the_agent_is_built(preference, module):
    """The import of the transport's library takes 0.2 s, so it belongs to the start of the host."""
    code = (
        "from z4j_bare.settings import Settings\n"
        "from z4j_bare.transport.auto import TransportFactory\n"
        "url = 'http://127.0.0.1:1'\n"
        f"TransportFactory(url, {preference!r}, str, Settings(), None, dev_mode=True)"
    )
    assert module in loaded_by(code)


@pytest.mark.parametrize(
    ("modules", "connected"),
    [("z4j_celery", True), ("celery, z4j_bare", True), ("z4j_bare, celery", False)],
)
def test_import_of_z4j_celery_connects_handlers(modules, connected):
    """Importing z4j_celery is enough to follow a worker's start, also before Celery is imported."""
    loaded_by(
        f"import {modules}\nfrom celery import signals\n"
        f"assert bool(signals.worker_init.receivers) is {connected}"
    )
