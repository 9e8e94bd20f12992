"""The chores with the agent, in a worker whose pool may be restarted if its environment says so."""

import os

from installed import app

app.conf.worker_pool_restarts = "E2E_RESTARTS" in os.environ
# With kombu's ``global_keyprefix`` nobody can ask whether a queue is there, so that the adapter never purges one.
app.conf.broker_transport_options = {}

__all__ = ["app"]
