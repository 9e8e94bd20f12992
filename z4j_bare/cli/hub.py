"""``z4j-bare hub``: how late each worker's hub is, and which code held the hub."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from z4j_bare import control
from z4j_bare.cli import configuration
from z4j_bare.cli.agents import (
    ANSWER_TIMEOUT,
    answers_exit_code,
    no_agent_text,
    no_answer_text,
    query_selected,
)
from z4j_bare.cli.output import Output
from z4j_bare.errors import HostConfigurationError
from z4j_bare.monitoring.duplicate_agents import workers_of

EXAMPLES = """\
examples:
  z4j-bare hub                         lags since the start, and code that held the hub for 1 s
  z4j-bare hub --profile 30            sample for 30 s, with holds of 20 ms and more
  z4j-bare hub --profile 30 --output hub.txt    also write a file for speedscope or flamegraph.pl

A hub runs one greenlet at a time. While a greenlet computes or calls a function that is not
patched, no other task of the worker runs. Workers without gevent or eventlet have no hub.
exit codes: 0 every agent answered, 1 an agent did not answer or no agent runs, 2 usage
"""

COLUMNS = ("total", "longest", "holds", "kind", "task", "place")

#: Maximum number of places in the table. ``--json`` prints all.
MAX_ROWS = 20

#: Seconds to wait after the end of a profile before its result is read.
PROFILE_MARGIN = 0.5


#: Seconds to wait for the result of a profile. A task that holds the hub delays the result.
RESULT_TIMEOUT = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hub``."""
    parser.add_argument("--worker", metavar="NAME", help="only the agent of this worker")
    parser.add_argument(
        "--profile",
        type=_seconds,
        metavar="SECONDS",
        help="sample for so many seconds (at most 600) what holds the hub for 20 ms and more",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="with --profile: write the stacks, in milliseconds, for flame graph tools",
    )
    configuration.add_agents(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print lags and holds; return 0 if every selected agent has answered, else 1."""
    configuration.open_home(arguments)
    output = Output(json_only=arguments.json)
    if arguments.output:
        if not arguments.profile:
            raise HostConfigurationError(
                "--output needs --profile SECONDS: only a profile has stacks"
            )
        _write_stacks(arguments.output, ())  # fails before the profile if the path is unusable
    if arguments.profile:
        started = query_selected(control.HUB, {"profile": arguments.profile}, arguments)
        if any(each.get("has_hub") for each in started):
            output.print_line(f"sampling for {arguments.profile:g} s")
            time.sleep(arguments.profile + PROFILE_MARGIN)
    parameters = {"result": True} if arguments.profile else {}
    timeout = RESULT_TIMEOUT if arguments.profile else ANSWER_TIMEOUT
    answers = query_selected(control.HUB, parameters, arguments, timeout)
    code = answers_exit_code(answers)
    if not answers:
        output.print_line(no_agent_text(arguments))
    for answer in answers:
        print_answer(output, answer)
    if arguments.output:
        _write_stacks(arguments.output, answers)
        output.print_line(f"stacks written to {arguments.output}")
    output.print_json({"ok": code == 0, "home": str(configuration.home()), "agents": answers})
    return code


def print_answer(output: Output, answer: Mapping[str, Any]) -> None:
    """Write the lags of one agent and the table of the code that held its hub."""
    names = sorted(workers_of(answer))
    title = f"{', '.join(names) or answer['adapter']} (pid {answer['pid']})"
    if "error" in answer:
        output.print_line(no_answer_text(answer), "bold red")
        return
    lag, recent = answer["lag"], answer["lag"]["recent"]
    if answer["has_hub"]:
        output.print_line(f"{title}: lag of the {answer['concurrency']} hub", "bold")
    else:
        output.print_line(
            f"{title}: this process has no hub; the lag is the time that a thread waits for the"
            " interpreter lock and the processor",
            "bold",
        )
    output.print_table(
        ("", "p50", "p99", "max", "samples"),
        [
            [
                name,
                *(_duration(part[f"{key}_seconds"]) for key in ("p50", "p99", "max")),
                str(part["samples"]),
            ]
            for name, part in (("since start", lag), ("recent", recent))
        ],
    )
    output.print_line(f"lags since start: {histogram_text(lag['histogram'])}")
    if not answer["has_hub"]:
        output.print_line()
        return
    profile = answer.get("profile")
    holds = profile["holds"] if profile else answer["holds"]
    what = f"for 20 ms and more in {profile['seconds']:g} s" if profile else "for more than 1 s"
    if not holds:
        output.print_line(f"nothing held the hub {what}")
    else:
        output.print_line(f"held the hub {what}, the most expensive first")
        output.print_table(COLUMNS, [row(hold) for hold in holds[:MAX_ROWS]])
        if len(holds) > MAX_ROWS:
            rest = sum(hold["total_seconds"] for hold in holds[MAX_ROWS:])
            output.print_line(f"{len(holds) - MAX_ROWS} further places: {_duration(rest)}")
    output.print_line()


def histogram_text(histogram: Mapping[str, int]) -> str:
    """Return the ranges that contain a lag, with their numbers of lags."""
    texts, lower = [], "0"
    for bound, number in histogram.items():
        if number:
            upper = float(bound)
            above = f"above {_bound(float(lower))}"
            texts.append(f"{number} {above if math.isinf(upper) else 'up to ' + _bound(upper)}")
        lower = bound
    return ", ".join(texts) or "none"


def row(hold: Mapping[str, Any]) -> list[str]:
    """Return the table cells of a hold, one for each of :data:`COLUMNS`."""
    single = hold["single_holds"] * 2 >= hold["holds"]
    return [
        _duration(hold["total_seconds"]),
        _duration(hold["longest_seconds"]),
        str(hold["holds"]),
        "one holder" if single else "many steps",
        hold["task"] or "",
        hold["place"],
    ]


def _write_stacks(path: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file. Raises ``HostConfigurationError`` if this user cannot write it."""
    try:
        with path.open("w", encoding="utf-8") as file:
            for answer in answers:
                for stack, milliseconds in answer.get("stacks", {}).items():
                    file.write(f"{stack} {milliseconds}\n")
    except OSError as error:
        raise HostConfigurationError(f"cannot write --output {path}: {error.strerror}") from None


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _bound(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:g} ms"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 600:  # noqa: PLR2004 - the agent's limit; false for NaN
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0 and at most 600"
        )
    return seconds
