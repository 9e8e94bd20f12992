"""The sample tasks with one that needs no broker while it runs, and records its progress."""

import os
import time

from installed import app, runtime
from sample_tasks import HOME, IO_SECONDS


@app.task(name="e2e.ticks")
def ticks(mark):
    """Append a byte to ``<mark>.ticks`` every 50 ms until ``<mark>.end`` exists."""
    descriptor = os.open(HOME / f"{mark}.ticks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while not (HOME / f"{mark}.end").exists():
            os.write(descriptor, b".")
            time.sleep(IO_SECONDS)
    finally:
        os.close(descriptor)
    return mark


__all__ = ["app", "runtime"]
