"""``z4j-bare run``: the agent in a process of its own."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from z4j_bare.cli.apps import load_app
from z4j_bare.control import install_sighup_handler
from z4j_bare.errors import HostConfigurationError
from z4j_bare.install import install_agent

#: Seconds between two looks at the flag that a signal sets, and for the final drain.
POLL = 0.5
DRAIN = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add connection, engine and app. Secrets are better given by file: arguments show in the process list."""
    parser.add_argument("--brain-url", help="address of the brain (Z4J_BRAIN_URL)")
    parser.add_argument("--token", help="the agent's token (Z4J_TOKEN); visible in the process list")
    parser.add_argument("--token-file", type=Path, help="file with the token, re-read at every connect (Z4J_TOKEN_FILE)")
    parser.add_argument(
        "--hmac-secret-file", type=Path, help="file with the project's key, re-read likewise (Z4J_HMAC_SECRET_FILE)"
    )
    parser.add_argument("--project-id", help="project slug (Z4J_PROJECT_ID)")
    parser.add_argument("--engine", default="celery", choices=sorted(ENGINES), help="task queue (default: celery)")
    parser.add_argument("--app", "--celery-app", dest="app", metavar="MODULE:ATTR", help="the queue's application object")


def run(arguments: argparse.Namespace) -> int:
    """Run until SIGINT or SIGTERM, then drain for at most ``DRAIN`` seconds. SIGHUP connects anew. Exit code 0."""
    ended: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: ended.append(received))
    runtime = install_agent(
        engines=[ENGINES[arguments.engine](arguments.app)],
        brain_url=arguments.brain_url,
        token=arguments.token,
        token_file=arguments.token_file,
        hmac_secret_file=arguments.hmac_secret_file,
        project_id=arguments.project_id,
    )
    install_sighup_handler(runtime)
    while not ended:
        time.sleep(POLL)
    runtime.stop(timeout=DRAIN)
    return 0


def _celery(path: str | None) -> Any:
    app = load_app(path)
    try:
        from z4j_celery import CeleryEngineAdapter
    except ImportError as error:
        raise HostConfigurationError(f"--engine celery needs the adapter: pip install z4j-celery ({error})") from error
    return CeleryEngineAdapter(celery_app=app)


ENGINES: dict[str, Callable[[str | None], Any]] = {"celery": _celery}
