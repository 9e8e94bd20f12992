"""A Celery application whose schedules are rows of django-celery-beat."""

import os
from pathlib import Path

import django
from celery import Celery
from django.conf import settings
from django.core.management import call_command
from loop_check import sees_a_loop

from z4j_bare.demo import broker

HOME = Path(os.environ[broker.HOME])
DATABASE = HOME / "beat.sqlite3"

new = not DATABASE.exists()
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(DATABASE)}},
    INSTALLED_APPS=["django_celery_beat"],
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    USE_TZ=True,
)
django.setup()

from django.db import connection  # noqa: E402
from django_celery_beat.models import IntervalSchedule, PeriodicTask  # noqa: E402

if new:
    call_command("migrate", verbosity=0)
    hourly, _ = IntervalSchedule.objects.get_or_create(every=1, period=IntervalSchedule.HOURS)
    PeriodicTask.objects.create(
        name="hourly", task="e2e.mark", interval=hourly, args='["triggered"]', kwargs="{}"
    )
    connection.close()  # Prefork's children must not inherit the connection.

from z4j_celery import CeleryEngineAdapter  # noqa: E402
from z4j_celerybeat import CeleryBeatSchedulerAdapter  # noqa: E402

from z4j_bare import install_agent  # noqa: E402

app = Celery("django_beat")
app.conf.update(broker.settings_from_environment())
app.conf.result_backend = os.environ[broker.BROKER]


@app.task(name="e2e.mark")
def mark(name):
    (HOME / name).touch()


app.task(name="e2e.sees_a_loop")(sees_a_loop)


@app.task(name="e2e.edit")
def edit(name, **changes):
    """Change a schedule inside the worker, as an admin page in the same process would."""
    try:
        row = PeriodicTask.objects.get(name=name)
        for field, value in changes.items():
            setattr(row, field, value)
        row.save()
    finally:
        connection.close()


install_agent(
    engines=[CeleryEngineAdapter(celery_app=app)],
    schedulers=[CeleryBeatSchedulerAdapter(celery_app=app)],
)
