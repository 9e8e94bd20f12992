"""Logs failures to capture or encode events, with one warning for each kind of loss."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("z4j.runtime.events.losses")

#: Maximum number of kinds of loss that are logged. Losses of further kinds are only counted.
MAX_KINDS = 100

#: Maximum characters of a task's name in the log.
MAX_NAME_CHARS = 200


class LossLog:
    """Logs the first loss of each kind. A kind is a step that failed and an error's class."""

    def __init__(self, on_loss: Callable[[], object] = int) -> None:
        self._on_loss = on_loss
        self._logged: set[tuple[str, str]] = set()

    def report(self, step: str, task: object, error: Exception) -> None:
        """Count a loss, and log it if it is the first of its kind. Does not raise.

        The message omits the error's text, which may contain the task's arguments.
        """
        kind = (step, type(error).__name__)
        try:
            self._on_loss()
            if kind not in self._logged and len(self._logged) < MAX_KINDS:
                self._logged.add(kind)
                logger.warning(
                    "z4j: %s of task %s failed with %s; the host is not affected. The event counts"
                    " as lost. Further losses of this kind are counted, but not logged",
                    step,
                    str(task)[:MAX_NAME_CHARS],
                    kind[1],
                )
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = "?" if frame is None else f"{frame.tb_frame.f_code.co_name}:{frame.tb_lineno}"
            logger.debug("z4j: %s failed with %s in %s", step, kind[1], where)
        except Exception:
            # Logging itself failed. The exception must not reach the host's code.
            return
