"""Log lines for people, or one JSON object a line for whatever collects them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from z4j_bare.errors import HostConfigurationError

FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One object a line: ``ts`` (UTC), ``level``, ``logger``, ``message``, and ``exception`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; what is not JSON in a message is told as text."""
        line = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _OurHandler(logging.StreamHandler[Any]):
    """Told from others by its type."""


def configure(level: str, form: str = "text") -> None:
    """Log to stderr from now on. Raises ``HostConfigurationError`` for a level or a form that is none."""
    if level.upper() not in LEVELS:
        raise HostConfigurationError(f"Z4J_LOG_LEVEL={level!r} is none of {', '.join(LEVELS)}")
    if form not in FORMATS:
        raise HostConfigurationError(f"Z4J_LOG_FORMAT={form!r} is neither text nor json")
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _OurHandler)]:
        root.removeHandler(handler)
    handler = _OurHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(
        level=level.upper(), handlers=[handler]
    )  # nothing where somebody else has set logging up
