"""``z4j-bare version``: prints the versions of the packages, the protocol and Python."""

from __future__ import annotations

import argparse
import platform

from z4j_core.version import PROTOCOL_VERSION

from z4j_bare.cli import configuration
from z4j_bare.cli.output import Output
from z4j_bare.diagnostics.host import installed_versions

EXAMPLES = """\
examples:
  z4j-bare version
  z4j-bare version --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``version``."""
    configuration.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the versions of the installed packages, of the protocol and of Python; return 0."""
    output = Output(json_only=arguments.json)
    versions = {
        **dict(installed_versions()),
        "protocol": PROTOCOL_VERSION,
        "python": platform.python_version(),
    }
    for name, number in versions.items():
        output.print_line(f"{name} {number}")
    output.print_json(versions)
    return 0
