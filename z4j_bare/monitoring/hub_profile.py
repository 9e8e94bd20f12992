"""Samples which code holds the hub for 20 ms and more, for ``z4j-bare hub --profile``.

The agent imports this module when the first client asks for a profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from z4j_bare.monitoring.holds import UNSAMPLED, Hold, Sample, take_sample, weigh

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds between two ticks of the hub's timer during a profile. A tick takes 20 us.
TICK = 0.01

#: Minimum seconds of a hold that is recorded.
MIN_HOLD = 0.02

#: Seconds between two samples while the hub is on time. This takes 0.4 % of a processor.
SAMPLE_INTERVAL = 0.02

#: Seconds between two samples while the hub is held. This takes about 1 % of a processor.
SAMPLE_INTERVAL_HELD = 0.01

#: Maximum seconds of one profile.
MAX_SECONDS = 600.0

#: Maximum number of holds that are stored.
MAX_HOLDS = 20_000

#: Maximum number of different stacks that are stored.
MAX_STACKS = 5_000


class HubProfile:
    """Records holds of the hub for some seconds.

    :param hub_thread: key of the hub's thread in ``sys._current_frames``.
    :param current_task: returns the name of the running task; empty if none runs.
    """

    def __init__(
        self,
        backend: BaseConcurrency,
        hub_thread: int,
        seconds: float,
        current_task: Callable[[], str],
    ) -> None:
        self.seconds = seconds
        self.holds: list[Hold] = []
        self._backend = backend
        self._hub_thread = hub_thread
        self._current_task = current_task
        self._samples: list[Sample] = []
        self._started_at = backend.now()
        self._due = self._started_at + TICK
        self._cancel = backend.timer(TICK, self._tick)
        backend.start_native_thread(self._sample)

    def is_running(self) -> bool:
        """Return whether the profile still records."""
        return self._cancel is not None

    def _tick(self) -> None:
        """Record a hold if this tick is late. The hub's timer calls this, so it must not log."""
        now = self._backend.now()
        samples, self._samples = self._samples, []
        if now - self._due >= MIN_HOLD and len(self.holds) < MAX_HOLDS:
            # The hold began between the previous tick and this tick's due time; assume the middle.
            self.holds.append(Hold(self._due - TICK / 2, now, samples))
        self._due = now + TICK
        if now - self._started_at >= self.seconds and self._cancel is not None:
            cancel, self._cancel = self._cancel, None
            cancel()

    def _sample(self, sleep: Callable[[float], object]) -> None:
        """Sample the stack of a held hub. This runs in a native thread, so it must not log."""
        while self._cancel is not None and not self._backend.forked():
            held = self._backend.now() - self._due > 0
            sleep(SAMPLE_INTERVAL_HELD if held else SAMPLE_INTERVAL)
            now = self._backend.now()
            if now - self._due > TICK / 2 and (
                sample := take_sample(now, self._hub_thread, self._current_task())
            ):
                self._samples.append(sample)

    @staticmethod
    def add_stacks(stacks: dict[str, float], hold: Hold) -> None:
        """Add the seconds of a hold to the stacks that were sampled during the hold.

        A key lists the functions of a stack, outermost first, as flame graph tools read them.
        """
        for seconds, sample in weigh(hold):
            text = UNSAMPLED
            if sample is not None:
                names = (f"{each.module}.{each.function}" for each in reversed(sample.stack))
                text = ";".join(each.replace(";", ",") for each in names)
            if text in stacks or len(stacks) < MAX_STACKS:
                stacks[text] = stacks.get(text, 0.0) + seconds
