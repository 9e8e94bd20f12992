"""Answers the request ``log``: the last lines of the agent, its settings and loaded versions."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.monitoring.control_server import join_items
from z4j_bare.monitoring.recent_log import LogLine, recent_log
from z4j_bare.monitoring.scrubber import Scrubber, configured_secrets, environment_secrets

if TYPE_CHECKING:
    from z4j_core.models import Config

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.settings import Settings

#: Modules whose loaded versions are reported.
MODULES = (
    "amqp",
    "arq",
    "billiard",
    "celery",
    "django",
    "dramatiq",
    "eventlet",
    "gevent",
    "greenlet",
    "huey",
    "kombu",
    "redis",
    "requests",
    "rq",
    "taskiq",
    "websocket",
    "z4j_bare",
    "z4j_core",
)

#: Fields of ``Config`` that are secrets, or whose values may contain secrets.
_HIDDEN = frozenset({"token", "hmac_secret", "engines", "schedulers"})


def stream_log(
    head: Mapping[str, Any], config: Config, settings: Settings, backend: BaseConcurrency
) -> Iterator[str]:
    """Return the parts of a JSON text with settings, versions and log lines, without secrets.

    :param head: the first fields of the document.
    """
    checkpoint = TimeSlice(backend).checkpoint
    ok, secrets = backend.offload(configured_secrets, config, settings)
    if not ok:
        raise secrets
    checkpoint()
    scrubber = Scrubber([*secrets, *environment_secrets()])
    checkpoint()
    document = {
        **head,
        "versions": loaded_versions(),
        "settings": public_settings(config, settings),
    }
    yield json.dumps(scrubber.document(document), default=str)[:-1] + ', "lines": ['
    lines = list(recent_log.lines)
    for part in join_items(json.dumps(scrubber.text(format_line(line))) for line in lines):
        yield part
        checkpoint()
    yield "]}"


def public_settings(config: Config, settings: Settings) -> dict[str, Any]:
    """Return the effective settings. For token and HMAC secret, return only the source."""
    values = config.model_dump(mode="json", exclude=set(_HIDDEN))
    for name in ("redaction_extra_key_patterns", "redaction_extra_value_patterns"):
        values[name] = f"{len(values[name])} patterns"
    for name, file in (("token", settings.token_file), ("hmac_secret", settings.hmac_secret_file)):
        value = getattr(config, name)
        values[name] = "from a file" if file else "missing" if value is None else "set"
    for each in fields(settings):
        name = each.metadata["variable"].removeprefix("Z4J_").lower()
        value = getattr(settings, each.name)
        if value != each.default or name not in values:
            values[name] = str(value) if isinstance(value, Path) else value
    return values


def loaded_versions() -> dict[str, str]:
    """Return the versions of Python and of the loaded modules. Reads no file."""
    versions = {"python": platform.python_version(), "system": sys.platform}
    for name in MODULES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            versions[name] = str(version)
    return versions


def format_line(line: LogLine) -> str:
    """Return a line as text that begins with its time in UTC."""
    time = datetime.fromtimestamp(line.time, UTC).isoformat(timespec="milliseconds")
    return f"{time} {line.level} {line.logger}: {line.text}"
