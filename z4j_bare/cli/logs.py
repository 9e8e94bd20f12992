"""Formats the log of the command line as text, or as a JSON object per line for collectors."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TextIO

from z4j_bare.errors import HostConfigurationError

FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object.

    The object has the keys ``ts`` (time in UTC), ``level``, ``logger`` and ``message``. If the
    record contains an exception, the object also has the key ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON object of a record as one line of text."""
        fields = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class _CommandLineHandler(logging.StreamHandler[TextIO]):
    """The handler that :func:`configure` installs. A later call replaces only this handler."""


def configure(level: str, log_format: str = "text") -> None:
    """Log to stderr, unless the root logger has a handler that another module installed.

    Raises ``HostConfigurationError`` for an unknown level or format.

    :param level: one of :data:`LEVELS`, in any case.
    :param log_format: one of :data:`FORMATS`.
    """
    if level.upper() not in LEVELS:
        raise HostConfigurationError(
            f"Z4J_LOG_LEVEL={level!r} is not a log level: choose from {', '.join(LEVELS)}"
        )
    if log_format not in FORMATS:
        raise HostConfigurationError(
            f"Z4J_LOG_FORMAT={log_format!r} is not a log format: choose from {', '.join(FORMATS)}"
        )
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _CommandLineHandler)]:
        root.removeHandler(handler)
    handler = _CommandLineHandler()
    handler.setFormatter(
        JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT_FORMAT)
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
