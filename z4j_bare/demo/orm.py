"""A Django model on SQLite without a project around it; imported only where Django is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import django
from django.conf import settings
from django.db import connection, models

if TYPE_CHECKING:
    from pathlib import Path


def create_model(home: Path) -> Any:
    """Point Django at a new database in ``home`` and return a model with its table made."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(home / "orm.sqlite3")}
    settings.configure(DATABASES={"default": database}, USE_TZ=True)
    django.setup()

    class Visit(models.Model):  # type: ignore[misc]  # noqa: DJ008  nobody prints it
        id = models.AutoField(primary_key=True)

        class Meta:
            app_label = "demo"

    with connection.schema_editor() as editor:
        editor.create_model(Visit)
    connection.close()  # prefork's children must not inherit it
    return Visit


def record_visit(visit: Any) -> int:
    """Store a row and return how many there are.

    Raises ``SynchronousOnlyOperation`` where a running loop is visible: that is what Django looks at.
    """
    try:
        visit.objects.create()
        return int(visit.objects.count())
    finally:
        connection.close()
