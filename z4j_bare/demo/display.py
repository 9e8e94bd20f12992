"""The demo's terminal output: its progress on stderr and its report on stdout."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from z4j_bare.demo.report import Report

_HEADER = ("", "produced", "seen by the brain", "agrees", "")

#: Width of the table in characters, if stdout is not a terminal.
_WIDTH = 80

#: Maximum number of mismatches that the report lists one by one.
_MAX_MISMATCHES = 20


class LineProgress:
    """Prints one line per stage."""

    def stage(self, text: str) -> None:
        """Show the current stage."""
        print(f"z4j-bare demo: {text}", file=sys.stderr, flush=True)

    def finished(self, count: int) -> None:
        """Ignore the number of finished tasks; :class:`BarProgress` shows the number."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        pass


class BarProgress(LineProgress):
    """Shows a progress bar over ``total`` tasks. The class requires rich."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=total)

    def stage(self, text: str) -> None:
        """Show the current stage beside the bar."""
        self._progress.update(self._task, description=text)

    def finished(self, count: int) -> None:
        """Advance the bar to ``count`` finished tasks."""
        self._progress.update(self._task, completed=count)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._progress.stop()


def make_progress(total: int) -> LineProgress:
    """Return a progress bar if stderr is a terminal and rich is installed, else a line printer."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        return BarProgress(total)
    return LineProgress()


def render(report: Report) -> str:
    """Return the report as text without a trailing newline.

    If rich is installed, rich draws the table.
    """
    table = _rich_table if importlib.util.find_spec("rich") else _plain_table
    return "\n".join([table(report), "", *_details(report), *_problems(report), _result(report)])


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
        Column(_HEADER[0], no_wrap=True),
        Column(_HEADER[1], justify="right"),
        # This header has two lines, so that the table fits into 80 characters.
        Column(_HEADER[2], justify="right", max_width=len("the brain")),
        Column(_HEADER[3], justify="center"),
        Column(_HEADER[4]),
        box=box.SIMPLE_HEAD,
    )
    for cells in _cells(report):
        table.add_row(*cells, style="bold red" if "NO" in cells else None)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _plain_table(report: Report) -> str:
    rows = [_HEADER, *_cells(report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _details(report: Report) -> list[str]:
    agent, worker, warm_up = report.agent, report.worker, report.warm_up
    details = [
        ("pool", f"{report.pool}; broker: {report.broker}; total time {report.seconds:.0f} s"),
        ("agent", f"{agent['name']}, version {agent['version']} ({agent['version_status']})"),
        ("", f"{agent['state_at_work']} during the run, {agent['state_afterwards']} after it"),
        ("worker", f"{', '.join(worker['seen']) or 'not seen'}; exit code {worker['exit_code']}"),
        ("warm-up", f"first complete task in the brain after {warm_up['seconds']:.1f} s"),
    ]
    if report.slowest_delay is not None:
        delay = f"{report.slowest_delay:.2f} s between a task's end and its end in the brain"
        details.append(("max delay", f"{delay} ({report.slowest_kind})"))
    if report.dashboard:
        details.append(("dashboard", "{url}  {email}  {password}".format(**report.dashboard)))
    return [f"  {name:<11}{text}" for name, text in details]


def _problems(report: Report) -> list[str]:
    lines = [
        f"{each.kind} {each.task_id}: {each.seen or 'missing'} instead of {each.expected}"
        for each in report.mismatches
    ]
    if len(lines) > _MAX_MISMATCHES:
        lines[_MAX_MISMATCHES:] = [f"and {len(lines) - _MAX_MISMATCHES} more"]
    return [f"  {'PROBLEM':<11}{line}" for line in [*report.problems, *lines]]


def _result(report: Report) -> str:
    return "All figures agree." if report.ok else "The figures do NOT agree."
