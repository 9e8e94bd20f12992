"""The sample tasks with the agent, installed at import."""

import event_factory
from celery.signals import worker_shutting_down
from sample_tasks import app
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent

runtime = install_agent(engines=[CeleryEngineAdapter(celery_app=app)])


@worker_shutting_down.connect
def record_from_signal_handler(**_kwargs):
    """Record an event in the worker's signal handler, where no greenlet may switch."""
    runtime.record_event(event_factory.success("shutting-down", "e2e.shutting_down"))


__all__ = ["app"]
