"""Installs the agent: resolves the settings, and starts the agent when the process is ready."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_core.config import resolve_agent_config
from z4j_core.errors import ConfigError
from z4j_core.models import Config
from z4j_core.paths import reject_deprecated_path_env

from z4j_bare import _process_singleton as singleton
from z4j_bare.control import register_shutdown_atexit
from z4j_bare.engines.celery.worker_start import (
    WorkerStart,
    is_spawned_child,
    stop_with_worker,
)
from z4j_bare.errors import HostConfigurationError
from z4j_bare.framework import BareFrameworkAdapter
from z4j_bare.home import settle_home, settle_home_of_user
from z4j_bare.process import is_celery_worker, is_inspection_command, ready_worker
from z4j_bare.runtime import AgentRuntime
from z4j_bare.safety import safe_call
from z4j_bare.settings import Settings, load_settings, read_secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    from celery.worker.consumer import Consumer

logger = logging.getLogger("z4j.runtime.install")

#: Framework adapters in the order in which z4j_celery's own bootstrap tries them.
_FRAMEWORKS = (
    ("z4j_fastapi.framework", "FastAPIFrameworkAdapter"),
    ("z4j_flask.framework", "FlaskFrameworkAdapter"),
    ("z4j_django.framework", "DjangoFrameworkAdapter"),
)

#: Variables that are required for the installation of an agent, or replace a required variable.
_CONNECTION_VARIABLES = (
    "Z4J_BRAIN_URL",
    "Z4J_TOKEN",
    "Z4J_TOKEN_FILE",
    "Z4J_PROJECT_ID",
    "Z4J_HMAC_SECRET",
    "Z4J_HMAC_SECRET_FILE",
)


def install_agent(
    *,
    engines: list[Any],
    brain_url: str | None = None,
    token: str | None = None,
    project_id: str | None = None,
    hmac_secret: str | None = None,
    agent_name: str | None = None,
    agent_id: str | None = None,
    transport: str | None = None,
    framework: object = None,
    schedulers: list[Any] | None = None,
    environment: str | None = None,
    tags: dict[str, str] | None = None,
    dev_mode: bool | None = None,
    strict_mode: bool | None = None,
    autostart: bool | None = None,
    buffer_path: Path | None = None,
    max_payload_bytes: int | None = None,
    redaction_extra_key_patterns: list[str] | None = None,
    redaction_extra_value_patterns: list[str] | None = None,
    concurrency: str | None = None,
    token_file: Path | None = None,
    hmac_secret_file: Path | None = None,
) -> AgentRuntime:
    """Install the agent in this process and return its runtime.

    In a Celery worker the agent starts at ``worker_ready``. In ``celery inspect`` and similar
    commands the agent never starts. In any other process the agent starts immediately. If this
    process already has a runtime, that runtime is returned.

    A parameter that is ``None`` takes its value from its ``Z4J_*`` variable, or its default.

    :param engines: queue engine adapters.
    :param transport: ``auto``, ``ws`` or ``longpoll``.
    :param framework: a framework adapter or its class; ``BareFrameworkAdapter`` by default.
    :param schedulers: scheduler adapters.
    :param autostart: if false, return the runtime without starting it.
    :param buffer_path: a path whose directory is used for the buffer's files.
    :param max_payload_bytes: maximum bytes of one captured value. Longer values are truncated.
    :param concurrency: ``auto``, ``threads``, ``gevent`` or ``eventlet``.
    :param token_file: a file with the token. The file is read at each connect.
    :param hmac_secret_file: a file with the HMAC key. The file is read at each connect.
    :raises ConfigError: a setting is missing or wrong; usually the subclass
        ``HostConfigurationError``.
    :raises RuntimeError: an environment variable is set for a path that z4j no longer reads.
    """
    reject_deprecated_path_env()
    _worker_start.connect()
    if not engines and not schedulers:
        raise HostConfigurationError(
            "install_agent needs at least one engine or scheduler: pass engines=[...]"
        )
    settings = load_settings(
        concurrency=concurrency,
        transport=transport,
        token_file=token_file,
        hmac_secret_file=hmac_secret_file,
    )
    if settings.disabled or settings.testing:
        return _inert_runtime(settings, engines, schedulers, framework)
    config = resolve_config(
        settings,
        brain_url=brain_url,
        token=token,
        project_id=project_id,
        hmac_secret=hmac_secret,
        agent_name=agent_name,
        agent_id=agent_id,
        transport=transport,
        environment=environment,
        tags=tags,
        dev_mode=dev_mode,
        strict_mode=strict_mode,
        autostart=autostart,
        buffer_path=buffer_path,
        max_payload_bytes=max_payload_bytes,
        redaction_extra_key_patterns=redaction_extra_key_patterns,
        redaction_extra_value_patterns=redaction_extra_value_patterns,
    )
    runtime = AgentRuntime(
        config=config,
        framework=_adapter(framework, config),
        engines=engines,
        schedulers=schedulers,
        settings=settings,
    )
    holder: AgentRuntime = singleton.try_register(runtime, owner="install_agent")
    if holder is runtime and config.autostart:
        _start_when_ready(runtime)
    return holder


def resolve_config(settings: Settings, **keywords: Any) -> Config:
    """Return z4j_core's configuration from keywords and the environment.

    :param keywords: fields of ``Config``; ``None`` means that a keyword was not given.
    :raises HostConfigurationError: a value is missing or wrong; the message names its variable.
    """
    settle_home()  # z4j_core raises RuntimeError if the user has no home directory
    if keywords.get("token") is None and settings.token_file is not None:
        keywords["token"] = read_secret(settings.token_file, "Z4J_TOKEN_FILE")
    if settings.transport == "longpoll":
        # z4j_core's Config rejects "longpoll" without an agent id, which the brain sends only at
        # connect. Therefore Config gets "auto".
        keywords["transport"] = "auto"
    try:
        config = resolve_agent_config(framework_name="bare", explicit_kwargs=keywords)
    except ConfigError as error:
        raise HostConfigurationError(_one_line(error), details=error.details) from None
    _check_redaction_patterns(config)
    return config


def _one_line(error: ConfigError) -> str:
    """Return a configuration error as one line that names the variables."""
    cause = error.__cause__
    if cause is not None and hasattr(cause, "errors"):
        return "; ".join(map(_describe_problem, cause.errors(include_url=False)))
    name, _, rest = str(error).partition(" ")
    return f"{_variable(name)} {rest}" if name in Config.model_fields else str(error)


def _describe_problem(problem: Mapping[str, Any]) -> str:
    name = str(next(iter(problem["loc"]), ""))
    value = "" if name in ("", "token", "hmac_secret") else f"={problem['input']!r:.100}"
    return f"{_variable(name) or 'settings'}{value}: {problem['msg']}"


def _variable(name: str) -> str:
    return f"Z4J_{name.upper()}" if name else ""


def _check_redaction_patterns(config: Config) -> None:
    """Raise ``HostConfigurationError`` for an invalid redaction pattern.

    An agent without its redaction must not start, because it would capture secrets.
    """
    for name in ("extra_key_patterns", "extra_value_patterns"):
        patterns: dict[str, Any] = {name: tuple(getattr(config, f"redaction_{name}"))}
        if not patterns[name]:
            continue
        from z4j_core.redaction.engine import RedactionConfig, RedactionEngine

        try:
            RedactionEngine(RedactionConfig(**patterns))
        except ConfigError as error:
            raise HostConfigurationError(f"{_variable(f'redaction_{name}')}: {error}") from None


def _start_when_ready(runtime: AgentRuntime) -> None:
    if is_inspection_command():
        logger.debug("z4j: not starting the agent in a celery inspection command")
    elif is_spawned_child():
        logger.debug("z4j: not starting the agent in a child of a worker; its parent has one")
    elif is_celery_worker() and ready_worker() is None:
        _worker_start.start_when_ready(runtime)
    else:
        _start(runtime)


def _start(runtime: AgentRuntime) -> None:
    try:
        runtime.start()
    except BaseException:
        singleton.clear_runtime(expected=runtime)
        raise
    register_shutdown_atexit(lambda: _shutdown(runtime))


def _shutdown(runtime: AgentRuntime) -> None:
    safe_call(runtime.stop, timeout=5.0)
    singleton.clear_runtime(expected=runtime)


def _install_for_worker(consumer: Consumer) -> None:
    """Install the agent from the environment in a worker that is ready and has no agent.

    z4j_celery's own bootstrap has already tried to install an agent if it recognised the command
    line. The bootstrap recognises the ``celery`` script, but neither ``python -m celery`` (used by
    ``celery multi`` and ``--detach``) nor a program that calls ``app.worker_main()``. The bootstrap
    logs a wrong variable only at the level INFO, and as a missing variable.
    """
    if "z4j_celery" not in sys.modules:
        return
    from z4j_celery import CeleryEngineAdapter

    engine = CeleryEngineAdapter(celery_app=consumer.app, worker_hostname=consumer.hostname)
    try:
        runtime = install_agent(
            engines=[engine], framework=_installed_framework(), dev_mode=load_settings().dev_mode
        )
    except ConfigError as error:
        if any(name in os.environ for name in _CONNECTION_VARIABLES):
            logger.warning(
                "z4j: no agent in this worker: %s. Correct the setting and restart the worker",
                error,
            )
        else:
            logger.info(
                "z4j: no agent in this worker: Z4J_BRAIN_URL, Z4J_TOKEN, Z4J_PROJECT_ID and"
                " Z4J_HMAC_SECRET are not set, and the application does not call install_agent"
            )
    else:
        stop_with_worker(runtime)


def _installed_framework() -> type | None:
    """Return the class of the first framework adapter that is installed, or ``None``."""
    for module, name in _FRAMEWORKS:
        try:
            found: type = getattr(import_module(module), name)
        except ImportError:
            continue
        return found
    return None


def _adapter(framework: object, config: Config) -> object:
    if framework is None:
        return BareFrameworkAdapter(config)
    return framework(config) if isinstance(framework, type) else framework


def _inert_runtime(
    settings: Settings, engines: list[Any], schedulers: list[Any] | None, framework: object
) -> AgentRuntime:
    """Return a runtime that starts no agent and has a placeholder configuration."""
    placeholder = {"brain_url": "http://localhost", "token": "disabled", "project_id": "disabled"}
    config = Config.model_validate(placeholder, strict=False)
    runtime = AgentRuntime(
        config=config,
        framework=_adapter(framework, config),
        engines=engines,
        schedulers=schedulers,
        settings=settings,
    )
    runtime.start()
    return runtime


#: The handlers that follow the start of a Celery worker. They are connected when this package is
#: imported after Celery or z4j_celery, else by ``install_agent``.
_worker_start = WorkerStart(_start, _install_for_worker)
_worker_start.connect()
settle_home_of_user()
