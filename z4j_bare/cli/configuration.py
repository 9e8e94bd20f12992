"""Reads the settings of a command from flags, environment variables and a file.

Flags override environment variables, and environment variables override the file. This module
copies the settings of the file and of the flags into the environment of the process, because
adapters read their settings from the environment.
"""

from __future__ import annotations

import argparse
import difflib
import os
import stat
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from z4j_core.models import Config
from z4j_core.paths import reject_deprecated_path_env

from z4j_bare.errors import HostConfigurationError
from z4j_bare.home import settle_home
from z4j_bare.settings import Settings, load_settings

#: Settings that only the command line reads.
CLI_SETTINGS = frozenset({"home", "app", "log_format", "drain_seconds"})

#: Fields of ``Config`` that are not settings at the top level of a file. ``buffer_path`` is derived
#: from the state directory, and ``engines`` and ``schedulers`` are tables.
_NOT_IN_FILE = frozenset({"buffer_path", "engines", "schedulers"})

_SECRETS = frozenset({"token", "hmac_secret"})

#: Flags whose values are copied into environment variables, such as ``--token`` into ``Z4J_TOKEN``.
_FLAGS = (
    "brain_url",
    "token",
    "token_file",
    "hmac_secret",
    "hmac_secret_file",
    "project_id",
    "home",
    "concurrency",
)

#: Maps each flag with a secret to the variable that names a file with the same secret.
_SECRET_FILES = {"token": "Z4J_TOKEN_FILE", "hmac_secret": "Z4J_HMAC_SECRET_FILE"}

#: Base class of argparse's parsers and argument groups. The class has no public name.
ArgumentContainer = argparse._ActionsContainer  # noqa: SLF001


@dataclass(slots=True)
class FileSettings:
    """The settings of a file that are not copied into the environment."""

    dev_mode: bool | None = None
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the brain's address and the agent's credentials.

    No flag takes the signing key itself, because other users can see the arguments of a process
    while it runs, possibly for weeks.
    """
    group = parser.add_argument_group(
        "connection", "flags override environment variables, and the variables override the file"
    )
    add_config(group)
    group.add_argument("--brain-url", metavar="URL", help="address of the brain (Z4J_BRAIN_URL)")
    group.add_argument("--project-id", metavar="SLUG", help="project slug (Z4J_PROJECT_ID)")
    group.add_argument(
        "--token", help="the agent's token (Z4J_TOKEN); other users can see it in the process list"
    )
    group.add_argument(
        "--token-file",
        metavar="FILE",
        help="file that contains the token, read at each connect (Z4J_TOKEN_FILE)",
    )
    group.add_argument(
        "--hmac-secret-file",
        metavar="FILE",
        help="file that contains the signing key, read at each connect (Z4J_HMAC_SECRET_FILE)",
    )
    add_home(group)


def add_config(container: ArgumentContainer) -> None:
    """Add the flag for the settings file."""
    container.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with settings (Z4J_CONFIG)"
    )


def add_home(container: ArgumentContainer) -> None:
    """Add the flag for the state directory."""
    container.add_argument(
        "--home", metavar="DIR", help="directory of the agents' state (Z4J_HOME, default ~/.z4j)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag for JSON output."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_agents(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select running agents."""
    parser.add_argument(
        "--adapter",
        "-a",
        metavar="NAME",
        help="only agents of this framework adapter (bare, django, ...)",
    )
    add_json(parser)
    add_config(parser)
    add_home(parser)


def apply(arguments: argparse.Namespace) -> FileSettings:
    """Copy the settings of the file and of the flags into the environment.

    Returns the other settings of the file: ``dev_mode``, engines and schedulers.
    Raises ``HostConfigurationError``. The message names the file or the variable, and the fix.
    """
    file = FileSettings()
    path = getattr(arguments, "config", None) or os.environ.get("Z4J_CONFIG")
    if path:
        file = _read(Path(path))
    for name, variable in _SECRET_FILES.items():
        if getattr(arguments, name, None) is not None:
            os.environ.pop(variable, None)  # The variable's file would override the flag.
    for name in _FLAGS:
        value = getattr(arguments, name, None)
        if value is not None:
            os.environ[f"Z4J_{name.upper()}"] = str(value)
    reject_removed_variables()
    return file


def home() -> Path:
    """Return the state directory."""
    return settle_home(create=False)


def open_home(arguments: argparse.Namespace) -> None:
    """Apply the settings and check that the state directory is accessible.

    A missing directory is not created, because a misspelt ``Z4J_HOME`` must not leave one behind.

    Raises ``HostConfigurationError`` if a setting is invalid or the directory is inaccessible.
    """
    apply(arguments)
    try:
        with suppress(FileNotFoundError), os.scandir(settle_home(create=False)):
            pass
    except OSError as error:
        raise HostConfigurationError(
            f"cannot use Z4J_HOME={home()} as uid {os.geteuid()} ({error.strerror}): "
            "set Z4J_HOME to the directory of the agents and run this command as their user"
        ) from None


def reject_removed_variables() -> None:
    """Raise ``HostConfigurationError`` if a path variable that z4j no longer reads is set."""
    try:
        reject_deprecated_path_env()
    except RuntimeError as error:
        raise HostConfigurationError(str(error)) from None


def resolved(arguments: argparse.Namespace) -> tuple[Config, Settings]:
    """Apply and return the settings. Raises ``ConfigError`` if a setting is missing or wrong."""
    from z4j_bare.install import resolve_config

    file = apply(arguments)
    settings = load_settings()
    return resolve_config(settings, dev_mode=file.dev_mode), settings


def known_settings() -> frozenset[str]:
    """Return the names of the settings that a file may contain at its top level."""
    own = {each.metadata["variable"].removeprefix("Z4J_").lower() for each in fields(Settings)}
    return frozenset((set(Config.model_fields) - _NOT_IN_FILE) | own | CLI_SETTINGS)


def _read(path: Path) -> FileSettings:
    try:
        text = path.read_bytes()
        table = tomllib.loads(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise HostConfigurationError(f"cannot read --config {path}: {cause}") from None
    except tomllib.TOMLDecodeError as error:
        raise HostConfigurationError(f"--config {path} is not TOML: {error}") from None
    if _SECRETS & table.keys() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise HostConfigurationError(
            f"--config {path} contains a secret, and other users can read the file: "
            f"run chmod 600 {path}, or use token_file and hmac_secret_file"
        )
    file = FileSettings(
        dev_mode=_dev_mode(path, table.pop("dev_mode", None)),
        engines=_tables(path, "engines", table.pop("engines", {})),
        schedulers=_tables(path, "schedulers", table.pop("schedulers", {})),
    )
    for name, value in table.items():
        _set(path, name, value)
    return file


def _set(path: Path, name: str, value: object) -> None:
    """Copy a setting of the file into the environment, unless its variable is set already."""
    known = known_settings()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else "see Configuration in the documentation"
        raise HostConfigurationError(f"--config {path}: unknown setting {name!r}: {hint}")
    variable = f"Z4J_{name.upper()}"
    if not os.environ.get(variable):
        os.environ[variable] = _as_variable(path, name, value)


def _as_variable(path: Path, name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        if name != "tags":
            raise HostConfigurationError(
                f"--config {path}: {name} is a table, but must be a single value"
            )
        return ",".join(f"{key}={each}" for key, each in value.items())
    return str(value)


def _dev_mode(path: Path, value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise HostConfigurationError(f"--config {path}: dev_mode must be true or false, not {value!r}")


def _tables(path: Path, name: str, value: object) -> dict[str, dict[str, Any]]:
    if isinstance(value, Mapping) and all(isinstance(each, Mapping) for each in value.values()):
        return {key: dict(each) for key, each in value.items()}
    raise HostConfigurationError(
        f"--config {path}: {name} must be tables, "
        f'such as [{name}.NAME] followed by app = "shop.celery:app"'
    )
