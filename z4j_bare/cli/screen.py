"""Draws a screen that is refreshed, and reads the keys that the operator presses."""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

#: Codes of the terminal: use and leave the alternate screen, with the cursor hidden.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"

#: Codes of the terminal: move to the first line, delete the rest of the line, and of the screen.
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"

#: Maps each style to its code.
_STYLES = {"": "", "bold": "1", "dim": "2", "reverse": "7", "bold red": "1;31", "yellow": "33"}

#: Maximum bytes of one read of the keyboard.
_READ_BYTES = 64

#: No column is shortened to fewer characters.
_MIN_COLUMN = 8

#: Returned instead of a key at the end of the input, such as after an SSH connection is closed.
END = "end"


class Line(NamedTuple):
    """A line of the screen. The style is a key of ``_STYLES``."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """A column of a table.

    :param flexible: 0 if the column is never shortened. If the table is too wide, the columns with
        the highest number are shortened first.
    :param keep_end: whether to cut off the beginning of a long text instead of its end.
    """

    title: str
    right: bool = False
    flexible: int = 0
    keep_end: bool = False


class Screen:
    """The terminal of a command that refreshes its output.

    If the output is not a terminal, each drawn text follows the earlier text, and no key is read.

    :param stream: the output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._keyboard: int | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Use the whole terminal until the end of the block, and read single keys."""
        if not self.is_terminal:
            yield
            return
        with _single_keys() as self._keyboard:
            self._write(_ENTER)
            try:
                yield
            finally:
                self._write(_LEAVE)

    def size(self) -> tuple[int, int]:
        """Return the numbers of columns and lines; 0 lines if the output is not a terminal."""
        columns, lines = shutil.get_terminal_size()
        return (columns, lines) if self.is_terminal else (max(columns, 120), 0)

    def draw(self, lines: Sequence[Line]) -> None:
        """Replace the content of the terminal, without an empty screen in between."""
        if not self.is_terminal:
            self._write("".join(f"{line.text.rstrip()}\n" for line in lines))
            return
        columns, rows = self.size()
        shown = [_styled(line, columns) + _END_OF_LINE for line in lines[:rows]]
        self._write(_HOME + "\r\n".join(shown) + _END_OF_SCREEN)

    def wait(self, seconds: float) -> str:
        """Return the next key; ``""`` after ``seconds``, :data:`END` if the terminal has gone."""
        if self._keyboard is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self._keyboard], [], [], max(0.0, seconds))
        if not ready:
            return ""
        try:
            return os.read(self._keyboard, _READ_BYTES).decode(errors="ignore") or END
        except OSError:  # the terminal has gone
            return END

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the header and the rows as texts of at most ``width`` characters.

    Flexible columns are shortened until the table fits. Of columns with the same number, the
    widest is shortened first.
    """
    cells = [[column.title for column in columns], *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    excess = sum(widths) + 2 * (len(columns) - 1) - width
    while excess > 0:
        candidates = [
            index
            for index, column in enumerate(columns)
            if column.flexible and widths[index] > _MIN_COLUMN
        ]
        if not candidates:
            break
        widths[max(candidates, key=lambda index: (columns[index].flexible, widths[index]))] -= 1
        excess -= 1
    lines = []
    for row in cells:
        texts = [
            _fill(cell, size, column)
            for cell, size, column in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(texts)[:width])
    return lines


def table_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """Return the width of a table without shortened columns."""
    cells = [[column.title for column in columns], *rows]
    return sum(max(map(len, each)) for each in zip(*cells, strict=True)) + 2 * (len(columns) - 1)


def shorten(text: str, width: int, *, keep_end: bool = False) -> str:
    """Return ``text`` with at most ``width`` characters."""
    if len(text) <= width:
        return text
    return f"…{text[1 - width :]}" if keep_end else f"{text[: width - 1]}…"


def share(lines: int, wanted: Sequence[int]) -> list[int]:
    """Divide ``lines`` evenly between parts of the screen. A part gets at most its ``wanted``."""
    shares = [0] * len(wanted)
    while lines > 0:
        open_parts = [index for index, number in enumerate(wanted) if shares[index] < number]
        if not open_parts:
            break
        for index in open_parts[:lines]:
            shares[index] += 1
            lines -= 1
    return shares


def _fill(text: str, width: int, column: Column) -> str:
    text = shorten(text, width, keep_end=column.keep_end)
    return text.rjust(width) if column.right else text.ljust(width)


def _styled(line: Line, columns: int) -> str:
    text = "".join(each if each.isprintable() else "?" for each in line.text[:columns])
    code = "" if "NO_COLOR" in os.environ and line.style != "reverse" else _STYLES[line.style]
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


@contextmanager
def _single_keys() -> Iterator[int | None]:
    """Make the terminal deliver single keys; yield its descriptor, ``None`` without a terminal."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
