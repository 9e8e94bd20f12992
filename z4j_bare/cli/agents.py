"""Queries the running agents of this host for the commands, and describes missing answers."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.monitoring.duplicate_agents import workers_of

#: Seconds that an agent with thousands of tasks may need between two parts of its answer.
ANSWER_TIMEOUT = 10.0


#: The error of an agent that has not answered in time.
TIMED_OUT = "timed out"


def add_watch(parser: argparse.ArgumentParser) -> None:
    """Add the flag that refreshes the output."""
    parser.add_argument(
        "--watch",
        nargs="?",
        type=refresh_interval,
        const=1.0,
        metavar="SECONDS",
        help="refresh until interrupted (default: every second)",
    )


def refresh_interval(text: str) -> float:
    """Parse the value of ``--watch``: a number of seconds above 0 and at most an hour."""
    invalid = argparse.ArgumentTypeError(
        f"{text!r} is not a number of seconds above 0 and at most 3600"
    )
    try:
        seconds = float(text)
    except ValueError:
        raise invalid from None
    if not 0 < seconds <= 3600:  # noqa: PLR2004 - one hour; also true for NaN
        raise invalid
    return seconds


def query_selected(
    verb: str,
    parameters: Mapping[str, object],
    arguments: argparse.Namespace,
    timeout: float = ANSWER_TIMEOUT,
) -> list[dict[str, Any]]:
    """Return the answers of the agents that ``--adapter`` and ``--worker`` select.

    The answer of a failed request has ``error``. ``--worker`` does not exclude such an answer,
    because it does not name the agent's workers.

    :param timeout: seconds that an agent may need between two parts of its answer.
    """
    return [
        answer
        for answer in control.query(verb, parameters, timeout)
        if arguments.adapter in (None, answer["adapter"])
        and ("error" in answer or arguments.worker in (None, *workers_of(answer)))
    ]


def answers_exit_code(answers: Sequence[Mapping[str, Any]]) -> int:
    """Return 0 if at least one agent was asked and every agent has answered, else 1."""
    return 0 if answers and not any("error" in each for each in answers) else 1


def no_agent_text(arguments: argparse.Namespace) -> str:
    """Return the text for a selection without agents: the selection, and what to do."""
    adapter = f" of adapter {arguments.adapter}" if arguments.adapter else ""
    worker = f" that reports {arguments.worker}" if arguments.worker else ""
    text = f"no agent{adapter}{worker} runs with Z4J_HOME={configuration.home()}"
    if (adapter or worker) and (agents := control.status()):
        return f"{text}: the agents there are {', '.join(map(_agent_text, agents))}"
    if "Z4J_HOME" not in os.environ:
        text += ", the default, because Z4J_HOME is not set"
    return f"{text}: run this command with the Z4J_HOME and the user of the workers"


def _agent_text(agent: Mapping[str, Any]) -> str:
    names = ", ".join(sorted(workers_of(agent))) or "no worker"
    return f"{agent['adapter']} in process {agent['pid']} ({agent.get('error') or names})"


def no_answer_text(answer: Mapping[str, Any]) -> str:
    """Return the text for an agent that did not answer."""
    hint = (
        ": its process is stopped, or a task holds its hub" if answer["error"] == TIMED_OUT else ""
    )
    return (
        f"no answer from the {answer['adapter']} agent in process {answer['pid']}: "
        f"{answer['error']}{hint}"
    )
