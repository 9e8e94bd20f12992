"""Writes the output of the commands: text for people, one JSON object for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Version of the JSON objects of all commands.
SCHEMA = 1

#: Maps each verdict of a probe to the word that starts the printed line, and to the line's style.
VERDICTS = {
    "OK": ("ok", "green"),
    "WARN": ("warn", "yellow"),
    "SKIP": ("skip", "dim"),
    "FAIL": ("FAIL", "bold red"),
}


class Output:
    """Writes the results of a command.

    If ``rich`` is installed and the output is a terminal, ``rich`` draws colours, tables and
    progress bars. Output to a pipe or a file is plain text.

    :param json_only: whether to write only JSON objects, with :meth:`print_json`, and no text.
    :param stream: stream to write to; default: stdout.
    """

    def __init__(self, *, json_only: bool = False, stream: TextIO | None = None) -> None:
        self.json_only = json_only
        self._stream = stream or sys.stdout
        #: The console of ``rich``, or ``None`` if the output is plain text or JSON.
        self._console = None if json_only else _console(self._stream)

    @property
    def width(self) -> int | None:
        """The number of columns of the terminal; ``None`` if the output is not a terminal."""
        return shutil.get_terminal_size().columns if self._stream.isatty() else None

    def print_line(self, text: str = "", style: str = "") -> None:
        """Write a line of text."""
        if self.json_only:
            return
        if self._console is None:
            print(text, file=self._stream, flush=True)
        else:
            self._console.print(
                text, style=style or None, markup=False, highlight=False, soft_wrap=True
            )

    def print_verdict(self, verdict: str, name: str, text: str, fix: str = "") -> None:
        """Write verdict, name and text of a result on one line, and the fix on a second line.

        :param verdict: a key of :data:`VERDICTS`.
        """
        word, style = VERDICTS[verdict]
        self.print_line(f"{word:>4}  {name:<12} {text}", style)
        if fix:
            self.print_line(f"      {'':<12} -> {fix}")

    def print_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table with a header line."""
        if self._console is not None:
            self._console.print(_rich_table(columns, rows))
            return
        widths = column_widths(columns, rows)
        for row in (columns, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.print_line("  ".join(cells).rstrip())

    def print_json(self, value: Mapping[str, object]) -> None:
        """Write ``value`` with the schema version as JSON if the command has ``--json``."""
        if self.json_only:
            document = {"schema": SCHEMA, **value}
            print(json.dumps(document, indent=2, default=str), file=self._stream, flush=True)

    @contextmanager
    def live(self) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Yield a function ``redraw(draw)`` that clears the screen and calls ``draw()``.

        ``draw`` writes the whole screen. If the output is not a terminal, ``redraw`` only
        calls ``draw()``, and the new text follows the earlier text.
        """
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
        """Show progress. Yield a function to call with the number of completed items."""
        if self._console is None:
            yield _TextProgress(self, title, total)
            return
        from rich.progress import Progress

        with Progress(console=self._console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)


def column_widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of each column of a table: the length of its longest cell."""
    return [max(map(len, column)) for column in zip(columns, *rows, strict=True)]


class _TextProgress:
    """Prints a line after each tenth of the total, for output that is not a terminal."""

    def __init__(self, output: Output, title: str, total: int) -> None:
        self._output = output
        self._title = title
        self._total = max(1, total)
        self._last_tenth = -1

    def __call__(self, done: int) -> None:
        tenth = done * 10 // self._total
        if tenth > self._last_tenth:
            self._last_tenth = tenth
            self._output.print_line(f"{self._title}: {done} of {self._total}")


def _console(stream: TextIO) -> Console | None:
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream)  # rich reads NO_COLOR


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
