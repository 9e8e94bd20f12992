"""``z4j-bare version``."""

from __future__ import annotations

import argparse
import platform

from z4j_core.version import PROTOCOL_VERSION

from z4j_bare.cli.output import Output
from z4j_bare.diagnostics.host import installed_versions

EXAMPLES = """\
examples:
  z4j-bare version
  z4j-bare version --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the form."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Print one line per package that matters and is installed, the protocol and Python."""
    output = Output(machine=arguments.json)
    found = {
        **dict(installed_versions()),
        "protocol": PROTOCOL_VERSION,
        "python": platform.python_version(),
    }
    for name, number in found.items():
        output.say(f"{name} {number}")
    output.answer(found)
    return 0
