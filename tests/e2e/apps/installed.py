"""The chores with the agent installed at import, the usual way."""

import made
from celery.signals import worker_shutting_down
from chores import app
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent

runtime = install_agent(engines=[CeleryEngineAdapter(celery_app=app)])


@worker_shutting_down.connect
def record_from_signal_handler(**_kwargs):
    """Celery sends this from inside its handler of SIGTERM and SIGQUIT, where nothing may switch."""
    runtime.record_event(made.success("shutting-down", "e2e.shutting_down"))


__all__ = ["app"]
