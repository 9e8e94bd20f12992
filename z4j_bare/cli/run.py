"""``z4j-bare run``: the agent in a process of its own."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from z4j_bare import control
from z4j_bare.buffer import files as paths
from z4j_bare.buffer.errors import BUSY, classify
from z4j_bare.buffer.lock import OwnerLock
from z4j_bare.cli import adapters, configuration, logs
from z4j_bare.cli.systemd import Notifier
from z4j_bare.concurrency.detect import patch
from z4j_bare.errors import HostConfigurationError, LocalStorageError
from z4j_bare.install import install_agent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from z4j_bare.runtime import AgentRuntime

logger = logging.getLogger("z4j.runtime.cli")

EXAMPLES = """\
examples:
  z4j-bare run --config /etc/z4j/agent.toml
  z4j-bare run --app shop.celery:app --brain-url https://brain.example.com --project-id shop \\
      --token-file /run/secrets/z4j_token --hmac-secret-file /run/secrets/z4j_hmac
  z4j-bare run --engine celery=shop.celery:app --engine rq=shop.jobs:queue --scheduler celerybeat=shop.celery:app
  z4j-bare run --app shop.celery:app --concurrency gevent --log-format json

a file for --config:
  brain_url = "https://brain.example.com"
  project_id = "shop"
  token_file = "/run/secrets/z4j_token"
  hmac_secret_file = "/run/secrets/z4j_hmac"
  [engines.celery]
  app = "shop.celery:app"

signals: SIGTERM and SIGINT drain and end, SIGHUP connects anew (and reads rotated secrets).
exit codes: 0 ended by a signal, 1 could not start, 2 usage or configuration,
  3 another standalone agent of this project runs on this Z4J_HOME
"""

#: Exit code where another standalone agent has the place.
REFUSED = 3

#: Seconds between two looks at the flag that a signal sets; for the final drain; and of that, for what follows the acks.
POLL = 0.5

#: Seconds that a loop of the agent may be busy with one thing before systemd's watchdog is no longer fed; its steps take
#: milliseconds, and an import from a slow disk some seconds.
STUCK = 60.0
DRAIN = 10.0
FAREWELL = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add connection, engines, and how the process behaves."""
    configuration.add_connection(parser)
    group = parser.add_argument_group("what it looks after")
    pair = "NAME[=MODULE:ATTR]"
    for option, kinds in (("--engine", adapters.ENGINES), ("--scheduler", adapters.SCHEDULERS)):
        group.add_argument(
            option,
            action="append",
            type=_choice(kinds),
            metavar=pair,
            help=f"one of {', '.join(kinds)}; may be repeated",
        )
    group.add_argument(
        "--app",
        "--celery-app",
        dest="app",
        metavar="MODULE:ATTR",
        help="the object for all that name none (Z4J_APP)",
    )
    group = parser.add_argument_group("process")
    group.add_argument(
        "--concurrency",
        choices=("auto", "threads", "gevent", "eventlet"),
        help="patch the process first where asked for",
    )
    group.add_argument(
        "--drain",
        type=float,
        metavar="SECONDS",
        help=f"for the last acks at the end (default: {DRAIN:g})",
    )
    group.add_argument("--log-format", choices=logs.FORMATS, help="default: text (Z4J_LOG_FORMAT)")
    group.add_argument(
        "--allow-second",
        action="store_true",
        help="beside another standalone agent of this project",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGINT or SIGTERM, then drain. SIGHUP connects anew. Returns an exit code of :data:`EXAMPLES`."""
    file = configuration.apply(arguments)
    level = arguments.log_level or os.environ.get("Z4J_LOG_LEVEL") or "INFO"
    logs.configure(level, arguments.log_format or os.environ.get("Z4J_LOG_FORMAT") or "text")
    patch(os.environ.get("Z4J_CONCURRENCY") or "auto")
    drain = _drain(arguments.drain)
    try:
        with _place(alone=not arguments.allow_second), _told_to_end() as ended:
            _serve(_install(arguments, file), ended, drain)
    except _TakenError as error:
        print(f"z4j-bare: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _install(arguments: argparse.Namespace, file: configuration.FileSettings) -> AgentRuntime:
    app = arguments.app or os.environ.get("Z4J_APP")
    engines = wanted(arguments.engine, "Z4J_ENGINES", file.engines)
    schedulers = wanted(arguments.scheduler, "Z4J_SCHEDULERS", file.schedulers)
    if not engines and not schedulers:
        engines = {"celery": {}}
    return install_agent(
        engines=adapters.build(adapters.ENGINES, engines, app),
        schedulers=adapters.build(adapters.SCHEDULERS, schedulers, app),
        dev_mode=file.dev_mode,
    )


@contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """Yield a list that SIGINT and SIGTERM are noted in, from before the agent starts: none may end it without a drain."""
    ended: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(number, lambda received, _frame: ended.append(received)) for number in numbers
    ]
    try:
        yield ended
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _serve(runtime: AgentRuntime, ended: list[int], drain: float) -> None:
    control.install_sighup_handler(runtime)
    notifier = Notifier()
    notifier.ready()
    while not ended:
        stuck = runtime.stuck(STUCK)
        if not stuck:
            notifier.alive()
        notifier.status(f"stuck: {', '.join(stuck)}" if stuck else _summary(runtime.stats()))
        time.sleep(POLL)
    logger.info("z4j: %s: the agent ends, within %.0f s", signal.Signals(ended[0]).name, drain)
    notifier.stop_event()
    runtime.stop(timeout=drain)


def wanted(
    flags: list[tuple[str, str | None]] | None,
    variable: str,
    tables: Mapping[str, Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """Return options by adapter: those that flags name, else those of the variable, else those of the file.

    What the file says of an adapter holds for it whoever named it, except its ``app``.
    """
    kinds = adapters.ENGINES if variable == "Z4J_ENGINES" else adapters.SCHEDULERS
    pairs = flags or [
        _pair(word, kinds) for word in os.environ.get(variable, "").split(",") if word.strip()
    ]
    options = {adapters.known(name, kinds): dict(table) for name, table in tables.items()}
    if not pairs:
        return dict(options)
    return {name: {**options.get(name, {}), **({"app": app} if app else {})} for name, app in pairs}


def _pair(text: str, kinds: Mapping[str, adapters.Kind]) -> tuple[str, str | None]:
    name, _, app = text.partition("=")
    return adapters.known(name, kinds), app or None


def _choice(kinds: Mapping[str, adapters.Kind]) -> Any:
    def read(text: str) -> tuple[str, str | None]:
        try:
            return _pair(text, kinds)
        except HostConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _drain(flag: float | None) -> float:
    """Return the seconds for the end, and let ``stop()`` wait for acks nearly as long: nobody's tasks wait for it here."""
    text = os.environ.get("Z4J_DRAIN_SECONDS") or str(DRAIN)
    try:
        seconds = float(text) if flag is None else flag
    except ValueError:
        raise HostConfigurationError(
            f"Z4J_DRAIN_SECONDS={text!r} is not a number of seconds"
        ) from None
    if not 0 <= seconds <= 3600:  # noqa: PLR2004 - an hour; also refuses NaN
        raise HostConfigurationError(
            f"a drain of {seconds:g} s: between 0 and 3600 (--drain, Z4J_DRAIN_SECONDS)"
        )
    os.environ.setdefault("Z4J_FLUSH_SECONDS", f"{max(0.0, seconds - FAREWELL):g}")
    return seconds


class _TakenError(Exception):
    """Another standalone agent has the place."""


@contextmanager
def _place(*, alone: bool) -> Iterator[None]:
    """Be the only standalone agent of this project and home on this host, if ``alone``.

    Two would report every worker twice. A home that has no room for a lock has none for a second agent's either.
    """
    project = os.environ.get("Z4J_PROJECT_ID", "")
    lock = None
    try:
        if alone and project:
            directory = paths.private_directory(configuration.home())
            lock = OwnerLock(
                directory / f"standalone-{sha256(project.encode()).hexdigest()[:12]}.lock"
            )
    except LocalStorageError as error:
        if classify(error) != BUSY:
            logger.warning(
                "z4j: whether another standalone agent runs here cannot be told: %s", error
            )
        else:
            pids = ", ".join(str(desk.pid) for desk in control.list_clients("bare")) or "unknown"
            hint = "stop it, give this one a Z4J_HOME of its own, or pass --allow-second"
            text = f"a standalone agent of project {project} runs already on {configuration.home()} (pid {pids}): {hint}"
            raise _TakenError(text) from None
    try:
        yield
    finally:
        if lock is not None:
            lock.release(delete=True)


def _summary(stats: Mapping[str, Any]) -> str:
    if not stats.get("session_id"):
        return f"no session: {stats.get('last_error') or 'connecting'}; {stats.get('buffered', 0)} buffered"
    return f"connected over {stats['transport']}; {stats['buffered']} buffered"
