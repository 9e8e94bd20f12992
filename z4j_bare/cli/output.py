"""The one place for output: text for people, one JSON object for machines.

``rich`` draws where it is installed and a terminal is there to look at it. Piped output is plain text without colours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

#: What a line about something good, and so on, begins with, and its colour.
MARKS = {
    "OK": ("ok", "green"),
    "WARN": ("warn", "yellow"),
    "SKIP": ("skip", "dim"),
    "FAIL": ("FAIL", "bold red"),
}


class Output:
    """Where a command says what it found.

    :param machine: whether a program reads it: then nothing but one JSON object is written, by :meth:`answer`.
    """

    def __init__(self, *, machine: bool = False, stream: TextIO | None = None) -> None:
        self.machine = machine
        self._stream = stream or sys.stdout
        self._console = None if machine else _console(self._stream)

    @property
    def console(self) -> Any:
        """``rich``'s console, or ``None`` where there is no terminal or no ``rich``."""
        return self._console

    def say(self, text: str = "", style: str = "") -> None:
        """Write a line for people."""
        if self.machine:
            return
        if self._console is None:
            print(text, file=self._stream, flush=True)
        else:
            self._console.print(
                text, style=style or None, markup=False, highlight=False, soft_wrap=True
            )

    def mark(self, verdict: str, name: str, text: str, fix: str = "") -> None:
        """Write a line with a verdict (a key of :data:`MARKS`), and below it what to do about it."""
        word, style = MARKS[verdict]
        self.say(f"{word:>4}  {name:<12} {text}", style)
        if fix:
            self.say(f"      {'':<12} -> {fix}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table."""
        if self._console is not None:
            self._console.print(_rich_table(columns, rows))
            return
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            self.say(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )

    def answer(self, value: Any) -> None:
        """Write the answer for machines."""
        if self.machine:
            print(json.dumps(value, indent=2, default=str), file=self._stream, flush=True)

    @contextmanager
    def live(self) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Redraw in place; yields a function that takes one which writes everything. Without a terminal it appends."""
        if self._console is None:
            yield lambda draw: draw()
            return
        console = self._console

        def redraw(draw: Callable[[], None]) -> None:
            console.clear()
            draw()

        with console.screen(hide_cursor=True):
            yield redraw

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how far something has come; yields a function that takes how much is done."""
        if self._console is None:
            yield _Steps(self, title, total)
            return
        from rich.progress import Progress

        with Progress(console=self._console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)


class _Steps:
    """Progress without a terminal: a line at each tenth."""

    def __init__(self, output: Output, title: str, total: int) -> None:
        self._output = output
        self._title = title
        self._total = max(1, total)
        self._told = -1

    def __call__(self, done: int) -> None:
        tenth = done * 10 // self._total
        if tenth > self._told:
            self._told = tenth
            self._output.say(f"{self._title}: {done} of {self._total}")


def _console(stream: TextIO) -> Any:
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream)  # it knows NO_COLOR


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
