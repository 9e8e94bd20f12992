"""``z4j-bare``: parse, pick the command, turn configuration errors into one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from z4j_core.errors import ConfigError

#: Command, module, help. A module is imported when its command is asked for, so that ``version`` needs no demo extra.
COMMANDS = {
    "run": ("z4j_bare.cli.run", "run a standalone agent beside the workers"),
    "doctor": ("z4j_bare.cli.doctor", "find out why it does not connect, and what to do about it"),
    "check": ("z4j_bare.cli.check", "see whether the brain can be reached from here"),
    "demo": ("z4j_bare.demo.command", "see it all work: a real brain, a real worker, one scripted day"),
    "version": ("z4j_bare.cli.version", "print the versions"),
}

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def build_parser(prog: str, wanted: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the ``wanted`` command's module is imported for its options."""
    parser = argparse.ArgumentParser(prog=prog, description="The z4j agent for task workers.")
    parser.add_argument("--log-level", choices=LEVELS, default="INFO", help="what to log (default: INFO)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == wanted:
            found = import_module(module)
            found.add_arguments(sub)
            sub.epilog, sub.formatter_class = getattr(found, "EXAMPLES", None), argparse.RawDescriptionHelpFormatter
            sub.set_defaults(run=found.run)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command and return the exit code: its own, 2 for a usage or configuration error."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog or "z4j-bare", next((word for word in words if word in COMMANDS), None))
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return 2
    logging.basicConfig(level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        code: int = arguments.run(arguments)
    except ConfigError as error:
        print(f"z4j-bare: {error}", file=sys.stderr)
        return 2
    return code
