"""The sample tasks with tasks that run until a file appears, for workers that are killed."""

import os
import time

from installed import app, runtime
from sample_tasks import HOME, IO_SECONDS

#: Seconds after which Redis delivers a message again that no worker has acknowledged.
if "VISIBILITY_TIMEOUT" in os.environ:
    app.conf.broker_transport_options["visibility_timeout"] = int(os.environ["VISIBILITY_TIMEOUT"])


def hold(mark):
    """Create ``<mark>.started`` and wait for ``<mark>.end``."""
    (HOME / f"{mark}.started").touch()
    while not (HOME / f"{mark}.end").exists():
        time.sleep(IO_SECONDS)
    return mark


app.task(name="e2e.holds")(hold)
app.task(name="e2e.holds_late", acks_late=True)(hold)

__all__ = ["app", "runtime"]
