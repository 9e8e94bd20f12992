"""``z4j-bare check``: can the brain be reached from here? A few milliseconds, and no token is shown to anybody."""

from __future__ import annotations

import argparse

from z4j_core.errors import ConfigError

from z4j_bare.cli import configuration
from z4j_bare.cli.doctor import refuse, report
from z4j_bare.cli.output import Output
from z4j_bare.diagnostics import glance

EXAMPLES = """\
examples:
  z4j-bare check                     before a worker starts: buffer, name, port, certificate, health
  z4j-bare check --json

Whether the agent of this host is connected is what `z4j-bare status` says.
exit codes: 0 the brain can be reached, 1 it cannot or a setting is wrong, 2 usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the connection."""
    configuration.add_connection(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Run the probes that need no token and return 0, or 1 if one failed."""
    output = Output(machine=arguments.json)
    try:
        config, settings = configuration.resolved(arguments)
    except ConfigError as error:
        return refuse(output, error)
    return report(output, config, glance(config, settings))
