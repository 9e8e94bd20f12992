"""``z4j-bare doctor``: find out why it does not connect."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from z4j_core.errors import ConfigError

from z4j_bare.cli import configuration
from z4j_bare.cli.apps import load_app
from z4j_bare.cli.output import Output
from z4j_bare.diagnostics import ProbeResult, examine

EXAMPLES = """\
examples:
  z4j-bare doctor                                  with the settings of the environment
  z4j-bare doctor --config /etc/z4j/agent.toml     with those of an agent's file
  z4j-bare doctor --app shop.celery:app            import the app first: does it patch by half?
  z4j-bare doctor --json | jq '.probes[] | select(.ok | not)'

exit codes: 0 all is well, 1 a probe failed or a setting is wrong, 2 usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the connection and what to leave out."""
    configuration.add_connection(parser)
    parser.add_argument(
        "--app",
        metavar="MODULE:ATTR",
        help="import this first, to see whether it patches the process",
    )
    parser.add_argument("--no-websocket", action="store_true", help="do not try WebSocket")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Run every probe and return 0, or 1 if one failed."""
    output = Output(machine=arguments.json)
    try:
        if arguments.app:
            configuration.apply(arguments)  # what it installs wants the same settings
            load_app(arguments.app)
        config, settings = configuration.resolved(arguments)
    except ConfigError as error:
        return refuse(output, error)
    output.say(f"z4j-bare doctor: {config.brain_url} project {config.project_id}")
    return report(output, config, examine(config, settings, websocket=not arguments.no_websocket))


def refuse(output: Output, error: ConfigError) -> int:
    """Say that the settings themselves are wrong; return 1."""
    output.mark("FAIL", "settings", str(error))
    output.answer({"ok": False, "stage": "config", "error": str(error)})
    return 1


def report(output: Output, config: Any, results: Iterable[ProbeResult]) -> int:
    """Show results as they come; return 0 if all are good, else 1."""
    seen = []
    for result in results:
        seen.append(result)
        output.mark(result.verdict, result.name, result.text, result.fix)
    bad = [result.name for result in seen if not result.ok]
    verdict = f"{len(bad)} of {len(seen)} failed: {', '.join(bad)}" if bad else "all is well"
    output.say(verdict, "bold red" if bad else "bold green")
    output.answer(
        {"ok": not bad, "config": _public(config), "probes": [_plain(result) for result in seen]}
    )
    return 1 if bad else 0


def _public(config: Any) -> dict[str, str]:
    return {
        "brain_url": str(config.brain_url),
        "project_id": config.project_id,
        "buffer_path": str(config.buffer_path),
        "transport": config.transport,
    }


def _plain(result: ProbeResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "ok": result.ok,
        "message": result.message,
        "details": result.details,
    }
