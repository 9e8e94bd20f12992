"""How far the day has come, on stderr: a bar on a terminal with rich, a line per stage elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class Lines:
    """One line per stage; also the whole protocol of a progress display."""

    def stage(self, text: str) -> None:
        """Say what happens now."""
        print(f"z4j-bare demo: {text}", file=sys.stderr, flush=True)

    def seen(self, count: int) -> None:
        """Say how many tasks the brain shows as finished: nothing worth a line."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


class Bar(Lines):
    """A bar that fills as the brain shows more of ``total`` tasks as finished."""

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
        """Write it behind the bar."""
        self._progress.update(self._task, description=text)

    def seen(self, count: int) -> None:
        """Fill the bar."""
        self._progress.update(self._task, completed=count)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()


def display(total: int) -> Lines:
    """Return the display that suits stderr."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        return Bar(total)
    return Lines()
