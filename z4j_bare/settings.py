"""Reads the settings that z4j_core's ``Config`` does not have, and the agent's secrets.

A keyword of ``install_agent`` overrides a ``Z4J_*`` variable. A variable overrides the default. An
``AgentRuntime`` without ``settings`` reads the variables.
"""

# ruff: noqa: RUF009 - setting() returns a dataclass field, not a shared mutable default

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from z4j_bare.errors import HostConfigurationError

if TYPE_CHECKING:
    from z4j_core.models import Config

T = TypeVar("T")
N = TypeVar("N", int, float)

#: Length of the project's HMAC key, in bytes.
KEY_BYTES = 32

#: Matches a key in standard base64. Such a key can contain slashes, so it can look like a path.
_is_like_key = re.compile(r"[A-Za-z0-9+/]{43}=?").fullmatch

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


def _bool(name: str, text: str) -> bool:
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise HostConfigurationError(
        f"{name}={text!r} is neither on (1, true, yes, on) nor off (0, false, no, off)"
    )


def _lenient_bool(_name: str, text: str) -> bool:
    """Parse a flag like the published adapters do: an unknown word means off."""
    return text.lower() in _TRUE


def _seconds(name: str, text: str) -> float:
    return _number(name, text, float)


def _count(name: str, text: str) -> int:
    return _number(name, text, int)


def _number(name: str, text: str, kind: Callable[[str], N]) -> N:
    try:
        number = kind(text)
    except ValueError:
        raise HostConfigurationError(f"{name}={text!r} is not a number") from None
    if not math.isfinite(number):
        raise HostConfigurationError(f"{name}={text!r} is not a finite number")
    return number


def _existing_file(name: str, text: str) -> Path:
    path, problem = _find_file(text)
    if problem:
        raise HostConfigurationError(f"{name}={text!r}: {problem}")
    return path


def _secret_file(name: str, text: str) -> Path:
    """Parse the path of a secret's file. The error does not quote a secret given by mistake."""
    path, problem = _find_file(text)
    if not problem:
        return path
    is_path = os.sep in text and not _is_like_key(text)
    shown = repr(text) if is_path else "a name without a directory (not shown)"
    raise HostConfigurationError(
        f"{name}={shown}: {problem}; the setting takes the path of a file that contains the"
        " secret, not the secret"
    )


def _find_file(text: str) -> tuple[Path, str]:
    """Return a path with ``~`` expanded, and the problem if the path does not lead to a file."""
    path = Path(text)
    try:
        path = path.expanduser()
        return path, "" if stat.S_ISREG(path.stat().st_mode) else "no such file"
    except RuntimeError as error:
        return path, f"{error} Use an absolute path"
    except (FileNotFoundError, NotADirectoryError):
        return path, "no such file"
    except (OSError, ValueError) as error:  # their texts contain the path, which may be a secret
        return path, getattr(error, "strerror", None) or "no such file"


def _text(_name: str, text: str) -> str:
    return text


def setting(
    variable: str, parse: Callable[[str, str], T], default: T, minimum: float | None = None
) -> T:
    """Declare a field of ``Settings``: its environment variable, parser, default and minimum."""
    metadata = {"variable": variable, "parse": parse, "minimum": minimum}
    declared: T = field(default=default, metadata=metadata)
    return declared


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of the runtime. Durations are in seconds."""

    #: ``auto``, ``threads``, ``gevent`` or ``eventlet``. ``start()`` resolves ``auto``.
    concurrency: str = setting("Z4J_CONCURRENCY", _text, "auto")
    #: ``auto``, ``ws`` or ``longpoll``.
    #: ``auto`` uses long-poll if a proxy blocks WebSocket, else WebSocket.
    transport: str = setting("Z4J_TRANSPORT", _text, "auto")
    #: Do not start the agent.
    disabled: bool = setting("Z4J_DISABLED", _bool, False)
    #: For test suites: do not start the agent, but collect recorded events in ``runtime.recorded``.
    testing: bool = setting("Z4J_TESTING", _bool, False)
    #: Repeat task discovery when a ``tasks.py`` changes.
    dev_mode: bool = setting("Z4J_DEV_MODE", _lenient_bool, False)
    #: Maximum time that a captured event stays in memory. SIGKILL loses the events in memory.
    flush_interval: float = setting("Z4J_FLUSH_INTERVAL_SECONDS", _seconds, 0.2, 0.01)
    #: Number of captured events that triggers a flush before ``Z4J_FLUSH_INTERVAL_SECONDS`` ends.
    flush_events: int = setting("Z4J_FLUSH_EVENTS", _count, 256, 1)
    #: Maximum time that ``stop()`` waits for the brain's acks.
    flush_seconds: float = setting("Z4J_FLUSH_SECONDS", _seconds, 2.0, 0)
    #: Capacity of the ring, in events. A full ring drops its oldest event.
    ring_events: int = setting("Z4J_RING_EVENTS", _count, 10_000, 1)
    #: Send heartbeats. Without heartbeats the brain shows the agent as offline after 30 s.
    heartbeat: bool = setting("Z4J_HEARTBEAT", _bool, True)
    #: Do not send ``agent_status`` frames, the health reports of the agent.
    status_disabled: bool = setting("Z4J_AGENT_STATUS_DISABLED", _bool, False)
    #: File with the agent's token, read at each connect. A rotated token needs no restart.
    token_file: Path | None = setting("Z4J_TOKEN_FILE", _secret_file, None)
    #: File with the project's HMAC key, read at each connect.
    hmac_secret_file: Path | None = setting("Z4J_HMAC_SECRET_FILE", _secret_file, None)
    #: PEM bundle of certificate authorities.
    #: By default ``REQUESTS_CA_BUNDLE`` or ``SSL_CERT_FILE`` is used.
    ca_bundle: Path | None = setting("Z4J_CA_BUNDLE", _existing_file, None)
    #: Client certificate (PEM). The file must include the key if ``Z4J_CLIENT_KEY`` is not set.
    client_cert: Path | None = setting("Z4J_CLIENT_CERT", _existing_file, None)
    #: Private key of the client certificate (PEM).
    client_key: Path | None = setting("Z4J_CLIENT_KEY", _existing_file, None)
    #: Send the arguments of tasks.
    capture_args: bool = setting("Z4J_CAPTURE_ARGS", _bool, True)
    #: Send the results of tasks.
    capture_result: bool = setting("Z4J_CAPTURE_RESULT", _bool, True)
    #: Maximum time allowed before a restart for finishing the running tasks.
    restart_grace: float = setting("Z4J_RESTART_GRACE_SECONDS", _seconds, 30.0, 0)
    #: In a Celery worker with gevent, replace kombu's unpatched sleep when the worker starts.
    #: With the unpatched sleep, no task runs while Celery waits to reconnect to the broker.
    green_kombu: bool = setting("Z4J_GREEN_KOMBU", _bool, False)
    #: Interval at which all schedules are sent, even if none has changed. 0 disables it.
    schedule_resync: float = setting("Z4J_SCHEDULE_RESYNC_SECONDS", _seconds, 900.0, 0)
    #: Answer ``z4j-bare tasks`` and the other commands that inspect a running worker.
    inspect: bool = setting("Z4J_INSPECT", _bool, True)
    #: Maximum number of commands that run at the same time.
    command_workers: int = setting("Z4J_COMMAND_WORKERS", _count, 8, 1)

    def __post_init__(self) -> None:
        for each in fields(self):
            minimum, value = each.metadata["minimum"], getattr(self, each.name)
            if minimum is not None and value < minimum:
                raise HostConfigurationError(
                    f"{each.metadata['variable']}={value} is below its minimum of {minimum}"
                )


def load_settings(env: Mapping[str, str] | None = None, **keywords: object) -> Settings:
    """Return the effective settings.

    :param env: the environment, ``os.environ`` by default.
    :param keywords: fields of :class:`Settings`; ``None`` means that a keyword was not given.
    :raises HostConfigurationError: a value is bad; the message names the variable and the reason.
    """
    env = os.environ if env is None else env
    values: dict[str, Any] = {}
    for each in fields(Settings):
        variable, text = each.metadata["variable"], env.get(each.metadata["variable"], "").strip()
        if keywords.get(each.name) is not None:
            values[each.name] = keywords[each.name]
        elif text:
            values[each.name] = each.metadata["parse"](variable, text)
    return Settings(**values)


def read_secret(path: Path, variable: str) -> str:
    """Return the content of a secret file without surrounding whitespace.

    :param variable: the setting that names the file, for error messages.
    :raises HostConfigurationError: the file is empty or unreadable.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise HostConfigurationError(
            f"{variable}={path}: cannot read the file ({type(error).__name__})"
        ) from None
    if not text:
        raise HostConfigurationError(f"{variable}={path}: the file is empty")
    return text


def read_token(config: Config, settings: Settings) -> str:
    """Return the agent's token.

    :raises HostConfigurationError: the token file cannot be read.
    """
    path = settings.token_file
    return read_secret(path, "Z4J_TOKEN_FILE") if path else config.token.get_secret_value()


def read_key(config: Config, settings: Settings) -> bytes:
    """Return the project's HMAC key.

    :raises HostConfigurationError: the key is missing, malformed or too short.
    """
    # Imported late, because ``import z4j_bare`` loads this module and must be fast.
    from z4j_core.transport.hmac import decode_agent_hmac_secret

    path, value = settings.hmac_secret_file, config.hmac_secret
    variable = "Z4J_HMAC_SECRET_FILE" if path else "Z4J_HMAC_SECRET"
    if path is None and value is None:
        raise HostConfigurationError(
            "Z4J_HMAC_SECRET is missing: set it to the hmac_secret that the brain minted"
        )
    text = read_secret(path, variable) if path else value.get_secret_value() if value else ""
    try:
        key = decode_agent_hmac_secret(text)
    except ValueError:
        raise HostConfigurationError(
            f"{variable} is not the urlsafe-base64 text that the brain minted"
        ) from None
    if len(key) < KEY_BYTES:
        raise HostConfigurationError(
            f"{variable} decodes to {len(key)} bytes, but the brain mints {KEY_BYTES}: "
            "check whether the text was truncated"
        )
    return key


def deployment_id(config: Config, key: bytes) -> str:
    """Return the id of the project and brain to which the rows of a store belong.

    Only an agent of the same deployment sends the rows. The id has two parts: a hash of project and
    key, and a hash of project and brain address. If one part of two ids is equal, the ids are of
    the same deployment. Therefore the key or the address can change.
    """
    parts = key, str(config.brain_url).rstrip("/").encode()
    return " ".join(
        sha256(b"%b %b" % (config.project_id.encode(), part)).hexdigest()[:16] for part in parts
    )
