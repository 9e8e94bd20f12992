"""``z4j-bare``: parse the arguments, run the command, print configuration errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container, Sequence
from importlib import import_module
from typing import NamedTuple

from z4j_core.errors import ConfigError

from z4j_bare.cli import logs
from z4j_bare.cli.arguments import Parser
from z4j_bare.errors import LocalStorageError


class Command(NamedTuple):
    """Describes a command and the module that implements the command.

    :param add_arguments: name of the module's function that adds the command's options.
    :param run: name of the module's function that runs the command.
    :param examples: name of the module's text that ``--help`` prints after the options.
    """

    module: str
    help: str
    add_arguments: str = "add_arguments"
    run: str = "run"
    examples: str = "EXAMPLES"


#: Commands by name. :func:`main` imports only the module of the selected command.
COMMANDS = {
    "run": Command("z4j_bare.cli.run", "run a standalone agent in its own process"),
    "doctor": Command("z4j_bare.cli.doctor", "find out why an agent does not connect"),
    "check": Command(
        "z4j_bare.cli.doctor",
        "check that this host can reach the brain, without sending a token",
        "add_check_arguments",
        "run_check",
        "CHECK_EXAMPLES",
    ),
    "status": Command("z4j_bare.cli.status", "show the state of the agents on this host"),
    "top": Command("z4j_bare.cli.top", "show agents, tasks and failures on one screen"),
    "tasks": Command("z4j_bare.cli.tasks", "show the running tasks and where each of them is"),
    "hub": Command("z4j_bare.cli.hub", "show the lag of the hubs and the code that held them"),
    "metrics": Command(
        "z4j_bare.cli.metrics", "print or serve the metrics of the agents, for Prometheus"
    ),
    "restart": Command(
        "z4j_bare.cli.status",
        "make the agents on this host reconnect",
        "add_restart_arguments",
        "run_restart",
        "RESTART_EXAMPLES",
    ),
    "reload": Command(
        "z4j_bare.cli.status",
        "the same as restart",
        "add_restart_arguments",
        "run_restart",
        "RESTART_EXAMPLES",
    ),
    "buffer": Command(
        "z4j_bare.cli.buffer", "list, export, send or delete the buffers of ended processes"
    ),
    "demo": Command(
        "z4j_bare.demo.command", "start a real brain and a real worker and run a scripted scenario"
    ),
    "completion": Command("z4j_bare.cli.completion", "print a completion script for a shell"),
    "version": Command("z4j_bare.cli.version", "print the versions of z4j and its dependencies"),
}

#: Exit code of every command for a wrong usage or configuration.
USAGE_ERROR = 2

#: Exit code of every command after Ctrl-C.
INTERRUPTED = 130


def build_parser(prog: str, selected: Container[str]) -> argparse.ArgumentParser:
    """Return a parser with all commands and with the options of the ``selected`` commands."""
    parser = Parser(prog=prog, description="The z4j agent for task workers.")
    parser.add_argument(
        "--log-level", choices=logs.LEVELS, help="lowest level to log (Z4J_LOG_LEVEL, default INFO)"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = command.help[0].upper() + command.help[1:] + "."
        sub = commands.add_parser(name, help=command.help, description=description)
        if name in selected:
            module = import_module(command.module)
            getattr(module, command.add_arguments)(sub)
            sub.epilog = getattr(module, command.examples, None)
            sub.formatter_class = argparse.RawDescriptionHelpFormatter
            sub.set_defaults(run=getattr(module, command.run))
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command and return its exit code, or 2 for a usage or configuration error.

    :param argv: arguments without the program's name; default: ``sys.argv[1:]``.
    :param prog: name of the program in help and errors; default: ``z4j-bare``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog or "z4j-bare", [word for word in words if word in COMMANDS][:1])
    arguments = parser.parse_args(words)
    if arguments.command is None:
        parser.print_help()
        return USAGE_ERROR
    try:
        logs.configure(arguments.log_level or os.environ.get("Z4J_LOG_LEVEL") or "INFO")
        code: int = arguments.run(arguments)
    except (ConfigError, LocalStorageError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # The process that reads the pipe has exited, as `head` does.
        # Redirect stdout to /dev/null, because the interpreter's final flush would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
