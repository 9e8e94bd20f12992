"""The exit hooks of ``register_shutdown_atexit``."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from tests.launch import patch
patch(sys.argv[1])
import atexit, os
from z4j_bare.control import register_shutdown_atexit
atexit.register(lambda: os.write(1, b"host;"))
print(register_shutdown_atexit(lambda: os.write(1, b"agent;")), end=";", flush=True)
{last}
"""


@pytest.mark.parametrize("last", ["", "raise SystemExit(3)", "raise ValueError('host failed')"])
def test_callback_runs_once_at_exit(mode, last):
    """The callback runs once, however the interpreter ends, before the host's own exit hooks."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(last=last), mode],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout in ("threading;agent;host;", "atexit;agent;host;")
    assert (done.returncode == 0) is (last == "")


def test_atexit_alone_without_threading_hook(monkeypatch):
    """Without ``threading._register_atexit`` only ``atexit`` is used."""
    import atexit
    import threading

    from z4j_bare import control

    monkeypatch.delattr(threading, "_register_atexit", raising=False)
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    ran = []
    assert control.register_shutdown_atexit(lambda: ran.append(1)) == "atexit"
    registered[0]()
    registered[0]()
    assert ran == [1]
