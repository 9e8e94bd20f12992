"""``z4j-bare doctor`` and ``z4j-bare check``: find out why an agent does not connect."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_core.errors import ConfigError

from z4j_bare.cli import configuration
from z4j_bare.cli.adapters import load_app
from z4j_bare.cli.output import Output
from z4j_bare.diagnostics import ProbeResult, all_checks, quick_checks

if TYPE_CHECKING:
    from z4j_core.models import Config

EXAMPLES = """\
examples:
  z4j-bare doctor                                  with the settings of the environment
  z4j-bare doctor --config /etc/z4j/agent.toml     with the settings of an agent's file
  z4j-bare doctor --app shop.celery:app            import the app first, then check its patching
  z4j-bare doctor --json | jq '.probes[] | select(.ok | not)'
  z4j-bare doctor --bundle report.tar.gz           also write a file for a bug report

exit codes: 0 no probe failed, 1 a probe failed or a setting is wrong, 2 usage
"""

CHECK_EXAMPLES = """\
examples:
  z4j-bare check                     buffer directory, DNS, TCP, TLS and the brain's health route
  z4j-bare check --json

The command sends no token. Run it before a worker starts.
`z4j-bare status` reports whether the running agents are connected.
exit codes: 0 the brain is reachable, 1 the brain is unreachable or a setting is wrong,
  2 usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    add_check_arguments(parser)
    parser.add_argument(
        "--app",
        metavar="MODULE:ATTR",
        help="import this application first, then check what it patches, and Celery's broker",
    )
    parser.add_argument("--no-websocket", action="store_true", help="do not probe WebSocket")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FILE",
        help="also write a new .tar.gz file for a bug report: the results, settings without "
        "secrets, and state and last log lines of the running agents",
    )
    parser.add_argument(
        "--hmac-secret",
        metavar="KEY",
        help="the signing key (Z4J_HMAC_SECRET); other users can see it in the process list: "
        "prefer the variable or --hmac-secret-file",
    )


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``check``."""
    configuration.add_connection(parser)
    configuration.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run every probe. Return 1 if a probe failed or a setting is wrong, else 0."""
    output = Output(json_only=arguments.json)
    if arguments.bundle is None:
        document = _examine(output, arguments)
    else:
        from z4j_bare.cli import bundle

        with bundle.new_file(arguments.bundle) as file:
            document = _examine(output, arguments)
            names = bundle.write(file, arguments, document)
        output.print_line(
            f"wrote {len(names)} files to {arguments.bundle}; read them before you send the bundle"
        )
        document |= {"bundle": str(arguments.bundle)}
    output.print_json(document)
    return 0 if document["ok"] else 1


def run_check(arguments: argparse.Namespace) -> int:
    """Run the probes that send no token; return the same exit codes as :func:`run`."""
    output = Output(json_only=arguments.json)
    try:
        config, settings = configuration.resolved(arguments)
        document = report(output, config, quick_checks(config, settings))
    except ConfigError as error:
        document = report_configuration_error(output, error)
    output.print_json(document)
    return 0 if document["ok"] else 1


def report_configuration_error(output: Output, error: ConfigError) -> dict[str, Any]:
    """Print which setting is missing or wrong; return the document of ``--json``."""
    output.print_verdict("FAIL", "settings", str(error))
    return {"ok": False, "stage": "config", "error": str(error)}


def report(output: Output, config: Config, results: Iterable[ProbeResult]) -> dict[str, Any]:
    """Print each result as soon as the probe ends; return the document of ``--json``."""
    seen = []
    for result in results:
        seen.append(result)
        output.print_verdict(result.verdict, result.name, result.text, result.fix)
    failed = [result.name for result in seen if not result.ok]
    if failed:
        output.print_line(
            f"{len(failed)} of {len(seen)} probes failed: {', '.join(failed)}", "bold red"
        )
    else:
        output.print_line("no probe failed", "bold green")
    probes = [_as_dict(result) for result in seen]
    return {"ok": not failed, "config": _public_fields(config), "probes": probes}


def _examine(output: Output, arguments: argparse.Namespace) -> dict[str, Any]:
    app: object = None
    try:
        if arguments.app:
            # Call apply() before the import, because an agent that the application installs reads
            # the settings.
            configuration.apply(arguments)
            app = load_app(arguments.app)
        config, settings = configuration.resolved(arguments)
    except ConfigError as error:
        return report_configuration_error(output, error)
    output.print_line(f"z4j-bare doctor: brain {config.brain_url}, project {config.project_id}")
    results = all_checks(config, settings, websocket=not arguments.no_websocket, app=app)
    return report(output, config, results)


def _public_fields(config: Config) -> dict[str, str]:
    return {
        "brain_url": str(config.brain_url),
        "project_id": config.project_id,
        "buffer_path": str(config.buffer_path),
        "transport": config.transport,
    }


def _as_dict(result: ProbeResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "ok": result.ok,
        "message": result.message,
        "details": result.details,
    }
