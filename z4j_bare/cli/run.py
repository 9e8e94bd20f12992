"""``z4j-bare run``: runs the agent in its own process, for workers that run no agent."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from z4j_bare import control
from z4j_bare.buffer.errors import BUSY, classify
from z4j_bare.buffer.files import OwnerLock
from z4j_bare.cli import adapters, configuration, logs
from z4j_bare.cli.systemd import Notifier
from z4j_bare.concurrency.detect import patch
from z4j_bare.errors import HostConfigurationError, LocalStorageError
from z4j_bare.home import private_directory
from z4j_bare.install import install_agent

if TYPE_CHECKING:
    from z4j_bare.runtime import AgentRuntime

logger = logging.getLogger("z4j.runtime.cli.run")

EXAMPLES = """\
examples:
  z4j-bare run --config /etc/z4j/agent.toml
  z4j-bare run --app shop.celery:app --brain-url https://brain.example.com --project-id shop \\
      --token-file /run/secrets/z4j_token --hmac-secret-file /run/secrets/z4j_hmac
  z4j-bare run --engine celery=shop.celery:app --engine rq=shop.jobs:queue \\
      --scheduler celerybeat=shop.celery:app
  z4j-bare run --app shop.celery:app --concurrency gevent --log-format json

a file for --config:
  brain_url = "https://brain.example.com"
  project_id = "shop"
  token_file = "/run/secrets/z4j_token"
  hmac_secret_file = "/run/secrets/z4j_hmac"
  [engines.celery]
  app = "shop.celery:app"

signals: SIGTERM and SIGINT drain the buffer and stop; SIGHUP reads the token and key files again
  and reconnects.
exit codes: 0 stopped by a signal, 1 could not start, 2 usage or configuration,
  3 another standalone agent of this project runs with this Z4J_HOME
"""

#: Exit code when another standalone agent of the project runs with this Z4J_HOME.
ALREADY_RUNNING = 3

#: Seconds between two checks for a received signal.
POLL_INTERVAL = 0.5

#: If a step of one of the agent's loops takes this many seconds, the systemd watchdog is not reset.
#: Even the import of a module from a slow disk takes only some seconds.
STUCK_SECONDS = 60.0

#: Default time limit of the shutdown, in seconds.
DRAIN_SECONDS = 10.0

#: Seconds of the shutdown that are reserved for the work after the last ack.
POST_DRAIN = 1.0

#: Maximum value of --drain, in seconds.
MAX_DRAIN_SECONDS = 3600.0


class AlreadyRunningError(Exception):
    """Another standalone agent of the project runs with this Z4J_HOME."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run``."""
    configuration.add_connection(parser)
    group = parser.add_argument_group("engines and schedulers")
    for option, specs in (("--engine", adapters.ENGINES), ("--scheduler", adapters.SCHEDULERS)):
        group.add_argument(
            option,
            action="append",
            type=_adapter_choice(specs),
            metavar="NAME[=MODULE:ATTR]",
            help=f"adapter to run, repeatable: {', '.join(specs)} (Z4J_{option[2:].upper()}S)",
        )
    group.add_argument(
        "--app",
        "--celery-app",
        dest="app",
        metavar="MODULE:ATTR",
        help="application object of every adapter without its own (Z4J_APP)",
    )
    group = parser.add_argument_group("process")
    group.add_argument(
        "--concurrency",
        choices=("auto", "threads", "gevent", "eventlet"),
        help="gevent and eventlet monkey-patch the process (Z4J_CONCURRENCY, default auto)",
    )
    group.add_argument(
        "--drain",
        type=float,
        metavar="SECONDS",
        help=f"time limit of the shutdown (Z4J_DRAIN_SECONDS, default {DRAIN_SECONDS:g})",
    )
    group.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        help="format of the log on stderr (Z4J_LOG_FORMAT, default text)",
    )
    group.add_argument(
        "--allow-second",
        action="store_true",
        help="start even if another standalone agent of this project runs with this Z4J_HOME",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the agent until SIGINT or SIGTERM, then drain its buffer.

    Returns an exit code. :data:`EXAMPLES` explains the exit codes.
    """
    file = configuration.apply(arguments)
    level = arguments.log_level or os.environ.get("Z4J_LOG_LEVEL") or "INFO"
    logs.configure(level, arguments.log_format or os.environ.get("Z4J_LOG_FORMAT") or "text")
    patch(os.environ.get("Z4J_CONCURRENCY") or "auto")
    drain = _drain_seconds(arguments.drain)
    try:
        with _single_instance(enforce=not arguments.allow_second), _termination_signals() as caught:
            # Without the handler, SIGHUP would end this process, and the agent would write no pid
            # file.
            control.install_sighup_handler(None)
            _serve(_install(arguments, file), caught, drain)
    except AlreadyRunningError as error:
        print(f"z4j-bare: {error}", file=sys.stderr)
        return ALREADY_RUNNING
    return 0


def _install(arguments: argparse.Namespace, file: configuration.FileSettings) -> AgentRuntime:
    app = arguments.app or os.environ.get("Z4J_APP")
    engines = select_adapters(arguments.engine, "Z4J_ENGINES", file.engines)
    schedulers = select_adapters(arguments.scheduler, "Z4J_SCHEDULERS", file.schedulers)
    if not engines and not schedulers:
        engines = {"celery": {}}
    return install_agent(
        engines=adapters.build(adapters.ENGINES, engines, app),
        schedulers=adapters.build(adapters.SCHEDULERS, schedulers, app),
        dev_mode=file.dev_mode,
    )


@contextmanager
def _termination_signals() -> Iterator[list[int]]:
    """Yield a list to which handlers of SIGINT and SIGTERM append the received signals.

    The handlers are installed before the agent starts, so no signal ends the agent without a drain.
    """
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [
        signal.signal(number, lambda received, _frame: caught.append(received))
        for number in numbers
    ]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _serve(runtime: AgentRuntime, caught: list[int], drain: float) -> None:
    notifier = Notifier()
    notifier.ready()
    while not caught:
        stuck = runtime.stuck(STUCK_SECONDS)
        if not stuck:
            notifier.alive()
        notifier.status(f"stuck: {', '.join(stuck)}" if stuck else _summary(runtime.stats()))
        time.sleep(POLL_INTERVAL)
    name = signal.Signals(caught[0]).name
    logger.info("z4j: received %s: the agent stops within %.0f s", name, drain)
    notifier.stopping()
    runtime.stop(timeout=drain)


def select_adapters(
    flags: list[tuple[str, str | None]] | None,
    variable: str,
    tables: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """Return the options of each selected adapter by its name.

    The flags select the adapters. Without flags, the variable selects the adapters. Without flags
    and variable, the file selects them. An adapter's options come from the file. A flag or the
    variable can override only the option ``app``.

    :param flags: name and application of each adapter in ``--engine`` or ``--scheduler``.
    :param variable: ``Z4J_ENGINES`` or ``Z4J_SCHEDULERS``.
    :param tables: options of each adapter in the file, by adapter name.
    """
    specs = adapters.ENGINES if variable == "Z4J_ENGINES" else adapters.SCHEDULERS
    pairs = flags or [
        _parse_adapter(word, specs)
        for word in os.environ.get(variable, "").split(",")
        if word.strip()
    ]
    options = {adapters.require_known(name, specs): dict(table) for name, table in tables.items()}
    if not pairs:
        return dict(options)
    return {name: {**options.get(name, {}), **({"app": app} if app else {})} for name, app in pairs}


def _parse_adapter(text: str, specs: Mapping[str, adapters.AdapterSpec]) -> tuple[str, str | None]:
    """Parse ``NAME`` or ``NAME=MODULE:ATTR`` into an adapter's name and its application."""
    name, _, app = text.partition("=")
    return adapters.require_known(name, specs), app or None


def _adapter_choice(
    specs: Mapping[str, adapters.AdapterSpec],
) -> Callable[[str], tuple[str, str | None]]:
    def parse(text: str) -> tuple[str, str | None]:
        try:
            return _parse_adapter(text, specs)
        except HostConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _drain_seconds(flag: float | None) -> float:
    """Return the time limit of the shutdown, in seconds.

    If ``Z4J_FLUSH_SECONDS`` is not set, set it to the time limit minus :data:`POST_DRAIN`. The
    default of the setting is too short here: it suits a worker, whose exit must not wait long for
    acks. A standalone agent runs no tasks and can wait longer.
    """
    text = os.environ.get("Z4J_DRAIN_SECONDS") or str(DRAIN_SECONDS)
    try:
        seconds = float(text) if flag is None else flag
    except ValueError:
        raise HostConfigurationError(
            f"Z4J_DRAIN_SECONDS={text!r} is not a number of seconds"
        ) from None
    if not 0 <= seconds <= MAX_DRAIN_SECONDS:  # also true for NaN
        raise HostConfigurationError(
            f"--drain (Z4J_DRAIN_SECONDS) must be between 0 and 3600 seconds, not {seconds:g}"
        )
    os.environ.setdefault("Z4J_FLUSH_SECONDS", f"{max(0.0, seconds - POST_DRAIN):g}")
    return seconds


@contextmanager
def _single_instance(*, enforce: bool) -> Iterator[None]:
    """Hold the lock that allows one standalone agent per project, ``Z4J_HOME`` and host.

    A second standalone agent would report every worker twice.
    If the lock file cannot be created, the agent starts without the lock, because a second agent
    could not create a buffer in that directory either.

    Raises ``AlreadyRunningError`` if another process holds the lock and ``enforce`` is true.
    """
    project = os.environ.get("Z4J_PROJECT_ID", "")
    lock = None
    try:
        if enforce and project:
            directory = private_directory(configuration.home())
            name = f"standalone-{sha256(project.encode()).hexdigest()[:12]}.lock"
            lock = OwnerLock(directory / name)
    except LocalStorageError as error:
        if classify(error) == BUSY:
            raise AlreadyRunningError(_already_running(project)) from None
        logger.warning(
            "z4j: cannot check for another standalone agent: %s; this agent starts nevertheless",
            error,
        )
    try:
        yield
    finally:
        if lock is not None:
            lock.release(delete=True)


def _already_running(project: str) -> str:
    pids = ", ".join(str(client.pid) for client in control.list_clients("bare")) or "unknown"
    return (
        f"a standalone agent of project {project} already runs with "
        f"Z4J_HOME={configuration.home()} (pid {pids}): "
        "stop it, set another Z4J_HOME, or pass --allow-second"
    )


def _summary(stats: Mapping[str, Any]) -> str:
    if not stats.get("session_id"):
        error = stats.get("last_error") or "connecting"
        return f"no session: {error}; {stats.get('buffered', 0)} buffered"
    return f"connected over {stats['transport']}; {stats['buffered']} buffered"
