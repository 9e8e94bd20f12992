"""A Django model on SQLite without a Django project.

This module is imported only if Django is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import django
from django.conf import settings
from django.db import connection, models

if TYPE_CHECKING:
    from pathlib import Path


def create_model(home: Path) -> Any:
    """Configure Django with a new database in ``home``; return a model with its table."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(home / "orm.sqlite3")}
    settings.configure(DATABASES={"default": database}, USE_TZ=True)
    django.setup()

    class Visit(models.Model):  # type: ignore[misc]  # noqa: DJ008 - never printed
        id = models.AutoField(primary_key=True)

        class Meta:
            app_label = "demo"

    with connection.schema_editor() as editor:
        editor.create_model(Visit)
    connection.close()  # Prefork's children must not inherit the connection.
    return Visit


def record_visit(visit: Any) -> int:
    """Insert a row and return the number of rows.

    Django raises ``SynchronousOnlyOperation`` if a running loop is visible.
    """
    try:
        visit.objects.create()
        return int(visit.objects.count())
    finally:
        connection.close()
