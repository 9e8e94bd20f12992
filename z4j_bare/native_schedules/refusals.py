"""Finds the schedules that a scheduler's adapter refuses, for example because their task is gone.

An adapter of z4j 1.13 checks all schedules that ``resolve`` returns. If the adapter refuses one of
them in its constructor, the host does not start. If it refuses one later, the scheduler starts no
task. Therefore ``resolve`` must not return such a schedule. The adapters pass their check only to
``mutate``, so ``resolve`` takes the check from the adapter that calls ``resolve``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType

from z4j_core.models import Schedule

#: Raises an exception if the adapter refuses the schedule.
Check = Callable[[Schedule], object]

#: The adapters' attribute that contains their control.
_CONTROL = "_control"

#: The adapters' method that checks a schedule.
_CHECK = "_validate"


class Refusals:
    """The check of one adapter. While the check is not known, no schedule is refused."""

    def __init__(self) -> None:
        self._check: Check | None = None
        self._running = False

    def learn(self, control: object, owner: str, caller: FrameType | None) -> None:
        """Take the check of the adapter whose method is ``caller``, unless a check is known.

        :param control: the object that the adapter calls.
        :param owner: the scheduler's name.
        """
        if self._check is not None or caller is None:
            return
        adapter = caller.f_locals.get("self")
        check = getattr(adapter, _CHECK, None)
        if (
            getattr(adapter, _CONTROL, None) is control
            and getattr(adapter, "name", None) == owner
            and callable(check)
        ):
            self._check = check

    def reason(self, schedule: Schedule) -> Exception | None:
        """Return the error of the check, ``None`` if the schedule is accepted.

        Inside a check, which may call ``resolve``, every schedule is accepted.
        """
        if self._check is None or self._running:
            return None
        self._running = True
        try:
            self._check(schedule)
        except Exception as error:  # an unknown time zone is a KeyError
            return error
        finally:
            self._running = False
        return None
