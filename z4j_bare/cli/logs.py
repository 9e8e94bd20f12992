"""Log format of the command line: text lines, or one JSON object a line for log collectors."""

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

    Keys: ``ts`` (UTC), ``level``, ``logger``, ``message``, and ``exception`` if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
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
    """Marker type: :func:`configure` replaces its own handler and leaves others installed."""


def configure(level: str, log_format: str = "text") -> None:
    """Log to stderr, unless the root logger already has a handler.

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
