"""The report for people: a rich table where rich is installed, columns otherwise, and a few lines."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from z4j_bare.demo.report import Report

_HEAD = ("", "produced", "seen by the brain", "agrees", "")
_WIDTH = 80  # where stdout is no terminal
_MISMATCHES_SHOWN = 20


def render(report: Report) -> str:
    """Return the whole text, without a newline at its end."""
    table = _rich_table if importlib.util.find_spec("rich") else _plain_table
    return "\n".join(
        [table(report), "", *_facts(report), *_problem_lines(report), _conclusion(report)]
    )


def _cells(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            figure.kind,
            str(figure.produced),
            str(figure.seen),
            "yes" if figure.agrees else "NO",
            figure.note,
        )
        for figure in report.figures
    ]


def _rich_table(report: Report) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column(_HEAD[0], no_wrap=True),
        Column(_HEAD[1], justify="right"),
        Column(
            _HEAD[2], justify="right", max_width=len("the brain")
        ),  # in two lines: the table fits 80 columns
        Column(_HEAD[3], justify="center"),
        Column(_HEAD[4]),
        box=box.SIMPLE_HEAD,
    )
    for cells in _cells(report):
        table.add_row(*cells, style="bold red" if "NO" in cells else None)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _plain_table(report: Report) -> str:
    rows = [_HEAD, *_cells(report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _facts(report: Report) -> list[str]:
    agent, worker, warm_up = report.agent, report.worker, report.warm_up
    facts = [
        ("pool", f"{report.pool}; broker: {report.broker}; {report.seconds:.0f} s in all"),
        ("agent", f"{agent['name']}, version {agent['version']} ({agent['version_status']})"),
        ("", f"{agent['state_at_work']} at work, {agent['state_afterwards']} afterwards"),
        ("worker", f"{', '.join(worker['seen']) or 'unseen'}; exit code {worker['exit_code']}"),
        ("warm-up", f"first complete task in the brain after {warm_up['seconds']:.1f} s"),
    ]
    if report.slowest_delay is not None:
        facts.append(
            (
                "slowest",
                f"{report.slowest_delay:.2f} s from a task's end to the brain ({report.slowest_kind})",
            )
        )
    if report.dashboard:
        facts.append(("dashboard", "{url}  {email}  {password}".format(**report.dashboard)))
    return [f"  {name:<10}{text}" for name, text in facts]


def _problem_lines(report: Report) -> list[str]:
    wrong = report.mismatches
    lines = [
        f"{one.kind} {one.task_id}: {one.seen or 'missing'}, not {one.expected}" for one in wrong
    ]
    if len(lines) > _MISMATCHES_SHOWN:
        lines[_MISMATCHES_SHOWN:] = [f"and {len(lines) - _MISMATCHES_SHOWN} more"]
    return [f"  WRONG     {line}" for line in [*report.problems, *lines]]


def _conclusion(report: Report) -> str:
    return "Every figure agrees." if report.ok else "The figures do NOT agree."
