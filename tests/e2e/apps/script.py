"""A script that installs the agent, records an event per argument, and does not stop the agent."""

import sys

import event_factory
from celery import Celery
from z4j_celery import CeleryEngineAdapter

from z4j_bare import install_agent

runtime = install_agent(
    engines=[CeleryEngineAdapter(celery_app=Celery("script", broker="memory://"))]
)
for task_id in sys.argv[1:]:
    runtime.record_event(event_factory.success(task_id, "e2e.script"))
