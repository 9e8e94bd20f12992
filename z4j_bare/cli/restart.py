"""``z4j-bare restart``: have the agents of this host end their sessions and connect anew. ``reload`` is the same."""

from __future__ import annotations

import argparse

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.cli.output import Output

EXAMPLES = """\
examples:
  z4j-bare restart                       every agent of this Z4J_HOME
  z4j-bare restart --adapter django      those of one framework adapter

Nothing is lost by it: the buffer stays, and what was not acknowledged is sent again. Files with secrets are read anew.
exit codes: 0 all were told, 1 none runs or one does not answer, 2 usage, or a platform without Unix sockets
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add whom to tell."""
    configuration.add_agents(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tell them and return the worst of the answers."""
    configuration.open_home(arguments)
    output = Output(machine=arguments.json)
    adapters = (
        [arguments.adapter]
        if arguments.adapter
        else sorted({desk.adapter for desk in control.list_clients()}) or ["bare"]
    )
    answers = {adapter: control.send_restart(adapter) for adapter in adapters}
    for code, text in answers.values():
        output.say(text, "bold red" if code else "")
    worst = max(code for code, _ in answers.values())
    output.answer(
        {"ok": worst == 0, "adapters": {name: text for name, (_, text) in answers.items()}}
    )
    return worst
