"""Exit hooks: once, whichever comes first, in every mode."""

import subprocess
import sys

import pytest

CODE = """
import sys
from tests.launch import patch
patch(sys.argv[1])
import atexit, os
from z4j_bare.control import register_shutdown_atexit
atexit.register(lambda: os.write(1, b"host;"))
print(register_shutdown_atexit(lambda: os.write(1, b"ours;")), end=";", flush=True)
{last}
"""


@pytest.mark.parametrize("last", ["", "raise SystemExit(3)", "raise ValueError('the host died')"])
def test_runs_once_at_exit(mode, last):
    """The hook runs exactly once however the interpreter ends, and before the host's own exit hooks."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE.format(last=last), mode],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout in ("threading;ours;host;", "atexit;ours;host;")
    assert (done.returncode == 0) is (last == "")


def test_without_the_private_hook(monkeypatch):
    """Where threading offers no hook, plain atexit is used and named."""
    import atexit
    import threading

    from z4j_bare import control

    monkeypatch.delattr(threading, "_register_atexit", raising=False)
    kept = []
    monkeypatch.setattr(atexit, "register", kept.append)
    ran = []
    assert control.register_shutdown_atexit(lambda: ran.append(1)) == "atexit"
    kept[0]()
    kept[0]()
    assert ran == [1]
