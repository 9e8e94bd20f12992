"""The one place where a command gets its settings: a file, the environment, flags, by weight from low to high.

What the file and the flags say is put into this process's environment, because adapters read theirs from there.
"""

from __future__ import annotations

import argparse
import difflib
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from z4j_core.models import Config
from z4j_core.paths import ensure_z4j_home, reject_deprecated_path_env, z4j_home

from z4j_bare.errors import HostConfigurationError
from z4j_bare.settings import Settings, load_settings

#: Settings of ``z4j-bare run`` alone.
OWN = frozenset({"home", "app", "log_format", "drain_seconds"})

#: Fields of ``Config`` that have no business in a file: one is derived, the others are tables.
_NOT_IN_A_FILE = frozenset({"buffer_path", "engines", "schedulers"})

_SECRETS = frozenset({"token", "hmac_secret"})

#: Flags of :func:`add_connection`, which are the fields of their settings.
_FLAGS = (
    "brain_url",
    "token",
    "token_file",
    "hmac_secret_file",
    "project_id",
    "home",
    "concurrency",
)


@dataclass(slots=True)
class FileSettings:
    """What a file said that is no environment variable."""

    dev_mode: bool | None = None
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add what says which brain, and as whom. Secrets are better given by file: arguments show in the process list."""
    group = parser.add_argument_group(
        "connection", "each also in the file (--config) and as an environment variable"
    )
    add_config(group)
    group.add_argument("--brain-url", metavar="URL", help="address of the brain (Z4J_BRAIN_URL)")
    group.add_argument("--project-id", metavar="SLUG", help="project slug (Z4J_PROJECT_ID)")
    group.add_argument("--token", help="the agent's token (Z4J_TOKEN); visible in the process list")
    group.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with the token, re-read at each connect (Z4J_TOKEN_FILE)",
    )
    group.add_argument(
        "--hmac-secret-file",
        metavar="FILE",
        help="file with the project's key, re-read likewise (Z4J_HMAC_SECRET_FILE)",
    )
    add_home(group)


def add_config(group: Any) -> None:
    """Add the file with the settings."""
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file, which all others outweigh (Z4J_CONFIG)",
    )


def add_home(group: Any) -> None:
    """Add the directory that agents keep their state in."""
    group.add_argument(
        "--home", metavar="DIR", help="directory of the agents' state (Z4J_HOME, default ~/.z4j)"
    )


def add_agents(parser: argparse.ArgumentParser) -> None:
    """Add which of the agents that run here are meant, and how to answer."""
    parser.add_argument(
        "--adapter",
        "-a",
        metavar="NAME",
        help="only agents of this framework adapter (bare, django, ...)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_config(parser)
    add_home(parser)


def apply(arguments: argparse.Namespace) -> FileSettings:
    """Put the file's and the flags' settings into the environment; return the file's tables.

    Raises ``HostConfigurationError`` naming the file or the variable, and what to do.
    """
    found = FileSettings()
    path = getattr(arguments, "config", None) or os.environ.get("Z4J_CONFIG")
    if path:
        found = _read(Path(path))
    for name in _FLAGS:
        value = getattr(arguments, name, None)
        if value is not None:
            os.environ[f"Z4J_{name.upper()}"] = str(value)
    refuse_old_paths()
    return found


def home() -> Path:
    """Return the directory that agents keep their state in."""
    return z4j_home()


def open_home(arguments: argparse.Namespace) -> None:
    """:func:`apply`, and make sure that agents can be looked for.

    Raises ``HostConfigurationError`` for a home that cannot be used.
    """
    apply(arguments)
    try:
        with os.scandir(ensure_z4j_home()):
            pass
    except OSError as error:
        hint = "name the directory of the agents, and be their user"
        raise HostConfigurationError(
            f"Z4J_HOME={z4j_home()} cannot be used by uid {os.geteuid()} ({error.strerror}): {hint}"
        ) from None


def refuse_old_paths() -> None:
    """Raise ``HostConfigurationError`` for a path variable that z4j no longer reads."""
    try:
        reject_deprecated_path_env()
    except RuntimeError as error:
        raise HostConfigurationError(str(error)) from None


def resolved(arguments: argparse.Namespace) -> tuple[Config, Settings]:
    """Return the settings in force for a command that talks to the brain. Raises ``ConfigError``."""
    from z4j_bare.install import resolve_config

    file = apply(arguments)
    settings = load_settings()
    return resolve_config(settings, dev_mode=file.dev_mode), settings


def known_settings() -> frozenset[str]:
    """Return the names that a file may use at its top level."""
    ours = {each.metadata["variable"].removeprefix("Z4J_").lower() for each in fields(Settings)}
    return frozenset((set(Config.model_fields) - _NOT_IN_A_FILE) | ours | OWN)


def _read(path: Path) -> FileSettings:
    try:
        text = path.read_bytes()
        table = tomllib.loads(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise HostConfigurationError(f"--config {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise HostConfigurationError(f"--config {path} is not TOML: {error}") from None
    if _SECRETS & table.keys() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise HostConfigurationError(
            f"--config {path} holds a secret and is open to others: chmod 600 it, or use token_file and hmac_secret_file"
        )
    found = FileSettings(
        dev_mode=_switch(path, table.pop("dev_mode", None)),
        engines=_tables(path, "engines", table.pop("engines", {})),
        schedulers=_tables(path, "schedulers", table.pop("schedulers", {})),
    )
    for name, value in table.items():
        _set(path, name, value)
    return found


def _set(path: Path, name: str, value: Any) -> None:
    """Let a setting of the file have its say, unless the environment has spoken."""
    known = known_settings()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else "see docs for the settings"
        raise HostConfigurationError(f"--config {path}: there is no setting {name!r}: {hint}")
    variable = f"Z4J_{name.upper()}"
    if not os.environ.get(variable):
        os.environ[variable] = _text(path, name, value)


def _text(path: Path, name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        if name != "tags":
            raise HostConfigurationError(f"--config {path}: {name} is a table, but takes one value")
        return ",".join(f"{key}={each}" for key, each in value.items())
    return str(value)


def _switch(path: Path, value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise HostConfigurationError(f"--config {path}: dev_mode is true or false, not {value!r}")


def _tables(path: Path, name: str, value: Any) -> dict[str, dict[str, Any]]:
    if isinstance(value, Mapping) and all(isinstance(each, Mapping) for each in value.values()):
        return {key: dict(each) for key, each in value.items()}
    raise HostConfigurationError(
        f'--config {path}: {name} are tables: [{name}.NAME] and below it app = "shop.celery:app"'
    )
