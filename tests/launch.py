"""Runs pytest in a patched process: ``python -m tests.launch MODE [pytest arguments]``.

MODE is ``threads``, ``gevent`` or ``eventlet``. Patching cannot be undone, so each mode needs its
own process.
"""

import os
import sys
import warnings


def patch(mode: str) -> None:
    if mode == "gevent":
        from gevent import monkey

        monkey.patch_all()
    elif mode == "eventlet":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its deprecation warning
            import eventlet
        eventlet.monkey_patch()
    elif mode != "threads":
        sys.exit(f"unknown mode {mode!r}: use threads, gevent or eventlet")


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    patch(mode)
    os.environ["Z4J_TEST_MODE"] = mode
    import pytest

    sys.exit(pytest.main(sys.argv[2:] or ["tests/unit"]))
