"""The sample tasks with the agent, in a worker whose pool restart depends on the environment."""

import os

from installed import app

app.conf.worker_pool_restarts = "E2E_RESTARTS" in os.environ
# With kombu's ``global_keyprefix`` the adapter cannot check whether a queue exists, and never
# purges one.
app.conf.broker_transport_options = {}

__all__ = ["app"]
