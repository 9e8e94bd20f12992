"""The sample tasks, two of them in Celery's static schedule, one with a secret argument."""

from datetime import timedelta

from sample_tasks import app
from z4j_celery import CeleryEngineAdapter
from z4j_celerybeat import CeleryBeatSchedulerAdapter

from z4j_bare import install_agent

app.conf.beat_schedule = {
    "hourly": {"task": "e2e.fails_once", "schedule": timedelta(hours=1), "args": ("triggered",)},
    "for someone@example.com": {
        "task": "e2e.add",
        "schedule": timedelta(minutes=5),
        "kwargs": {"x": 3, "y": 4, "api_key": "not for the brain"},
    },
}


@app.task(name="e2e.add_schedule")
def add_schedule(name):
    """Add a schedule to the static ones."""
    app.conf.beat_schedule[name] = {
        "task": "e2e.add",
        "schedule": timedelta(hours=2),
        "args": (1, 2),
    }


install_agent(
    engines=[CeleryEngineAdapter(celery_app=app)],
    schedulers=[CeleryBeatSchedulerAdapter(celery_app=app)],
)

__all__ = ["app"]
