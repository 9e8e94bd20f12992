"""Writes the file of ``z4j-bare doctor --bundle``: the data for a bug report, without secrets."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from z4j_core.errors import ConfigError

from z4j_bare import control
from z4j_bare.buffer import files, report
from z4j_bare.cli import buffer, configuration
from z4j_bare.cli.agents import ANSWER_TIMEOUT
from z4j_bare.diagnostics.host import installed_versions
from z4j_bare.errors import HostConfigurationError
from z4j_bare.monitoring.log_report import public_settings
from z4j_bare.monitoring.scrubber import Scrubber, configured_secrets, environment_secrets

#: Version of the bundle's layout.
SCHEMA = 1

#: The directory in the archive that contains all files.
DIRECTORY = "z4j-bundle"

#: Permission bits of the files in the archive.
_MODE = 0o600

README = """\
Written by `z4j-bare doctor --bundle` for a bug report.

about.json     versions of this host's Python and packages, and when the bundle was written
settings.json  the settings that this command found; of token and HMAC secret only the source
doctor.json    the results of the probes
status.json    the state of every agent of this Z4J_HOME
buffers.json   rows, bytes and losses of every buffer, without the rows
tasks.json     the running tasks and their stacks, without arguments and without values of variables
hub.json       the lag of every hub, and the code that held it
metrics.json   the counts of tasks by name, queue and end, and the classes of the last failures
agents.json    settings and loaded versions of every agent
log-*.txt      the last lines that an agent logged, at the log level of its process

Passwords, tokens and keys are replaced by ***. The files contain host names, paths, and names of
tasks, queues and workers. Read them before you send them.
"""


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Create a file that only this user can read, and yield it. An error removes the file again.

    Raises ``HostConfigurationError`` if the file exists or cannot be created.
    """
    try:
        files.create_file(path)
        file = path.open("wb")
    except OSError as error:
        raise HostConfigurationError(
            f"cannot create --bundle {path}: {error.strerror}: name a new file in a directory that"
            " this user can write"
        ) from None
    try:
        with file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write(file: BinaryIO, arguments: argparse.Namespace, doctor: dict[str, Any]) -> list[str]:
    """Write the bundle to ``file``; return the names of its files.

    :param doctor: the document with the results of the probes.
    """
    secrets, settings = _settings(arguments)
    scrubber = Scrubber(secrets)
    documents = {
        "about.json": _about(),
        "settings.json": settings,
        "doctor.json": doctor,
        "status.json": _collect(control.status),
        "buffers.json": _collect(_buffers),
        "tasks.json": _collect(_query, control.TASKS, {"stack": True}),
        "hub.json": _collect(_query, control.HUB),
        "metrics.json": _collect(_query, control.METRICS),
    }
    agents = _collect(_query, control.LOG)
    texts = {"README.txt": README}
    for agent in agents if isinstance(agents, list) else ():
        lines = agent.pop("lines", None)
        if lines is not None:
            name = re.sub(r"[^\w-]", "_", agent["adapter"])
            texts[f"log-{name}-{agent['pid']}.txt"] = "".join(f"{line}\n" for line in lines)
    documents["agents.json"] = agents
    for name, document in documents.items():
        text = json.dumps(scrubber.document(document), indent=2, default=str)
        texts[name] = text + "\n"
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in texts.items():
            content = (text if name in documents else scrubber.text(text)).encode(
                errors="backslashreplace"
            )
            entry = tarfile.TarInfo(f"{DIRECTORY}/{name}")
            entry.size, entry.mode, entry.mtime = len(content), _MODE, int(time.time())
            archive.addfile(entry, BytesIO(content))
    return sorted(texts)


def _settings(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Return this command's secrets, and its settings or the reason why the settings are wrong."""
    try:
        config, settings = configuration.resolved(arguments)
    except ConfigError as error:
        return environment_secrets(), {"error": str(error)}
    secrets = [*environment_secrets(), *configured_secrets(config, settings)]
    return secrets, public_settings(config, settings)


def _about() -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version,
        "platform": platform.platform(),
        "packages": dict(installed_versions()),
    }


def _buffers() -> list[dict[str, Any]]:
    directory = configuration.home() / "store"
    return [buffer.as_dict(report.read_report(path)) for path in report.stores(directory)]


def _query(verb: str, parameters: dict[str, object] | None = None) -> list[dict[str, Any]]:
    return control.query(verb, parameters, ANSWER_TIMEOUT)


def _collect(function: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of ``function``, or its error, so that the other files are written."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
