"""``z4j-bare``: parse, pick the command, turn configuration errors into one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container, Sequence
from importlib import import_module

from z4j_core.errors import ConfigError

from z4j_bare.cli import logs
from z4j_bare.errors import LocalStorageError

#: Command, module, help. A module is imported when its command is asked for, so that ``version`` needs no demo extra.
COMMANDS = {
    "run": ("z4j_bare.cli.run", "run a standalone agent beside the workers"),
    "doctor": ("z4j_bare.cli.doctor", "find out why it does not connect, and what to do about it"),
    "check": ("z4j_bare.cli.check", "see whether the brain can be reached from here"),
    "status": (
        "z4j_bare.cli.status",
        "how the agents of this host are; exits with 1 unless all are connected",
    ),
    "restart": ("z4j_bare.cli.restart", "have the agents of this host connect anew"),
    "reload": ("z4j_bare.cli.restart", "the same as restart"),
    "buffer": (
        "z4j_bare.cli.buffer",
        "look at what dead processes have left, save it, send it or throw it away",
    ),
    "demo": (
        "z4j_bare.demo.command",
        "see it all work: a real brain, a real worker, one scripted day",
    ),
    "completion": ("z4j_bare.cli.completion", "print what a shell needs to complete all this"),
    "version": ("z4j_bare.cli.version", "print the versions"),
}

#: Exit codes of every command: usage or configuration, and Ctrl-C. 0 is success, 1 what the command is there to find out.
USAGE = 2
INTERRUPTED = 130


def build_parser(prog: str, wanted: Container[str]) -> argparse.ArgumentParser:
    """Return the parser; only the ``wanted`` commands' modules are imported for their options."""
    parser = argparse.ArgumentParser(prog=prog, description="The z4j agent for task workers.")
    parser.add_argument(
        "--log-level", choices=logs.LEVELS, help="what to log (default: INFO; Z4J_LOG_LEVEL)"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in wanted:
            found = import_module(module)
            found.add_arguments(sub)
            sub.epilog, sub.formatter_class = (
                getattr(found, "EXAMPLES", None),
                argparse.RawDescriptionHelpFormatter,
            )
            sub.set_defaults(run=found.run)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command and return the exit code: its own, 2 for a usage or configuration error."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog or "z4j-bare", [word for word in words if word in COMMANDS][:1])
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return USAGE
    try:
        logs.configure(arguments.log_level or os.environ.get("Z4J_LOG_LEVEL") or "INFO")
        code: int = arguments.run(arguments)
    except (ConfigError, LocalStorageError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read us, head for one, has had enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter's last flush would complain
        return 0
    return code
