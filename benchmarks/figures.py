"""Ratios and differences of trials, paired by round.

Ratios are geometric means with a 95 % interval by Student's t on the logarithms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.trial import Trial

#: No agent, this checkout, another checkout of this project, and the existing agent.
VARIANTS = ("off", "ours", "baseline", "existing")

#: 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom. For more degrees, the normal
#: quantile is used.
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval, which is infinite with fewer than two rounds."""

    mean: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval, which is infinite with fewer than two rounds."""

    mean: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:.1f}, {self.high:.1f}]"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the geometric mean of ``ours[i] / theirs[i]``. No round is left out."""
    logs = [math.log(mine / base) for mine, base in zip(ours, theirs, strict=True)]
    mean, half = fmean(logs), _half_interval(logs)
    # ``math.exp(inf)`` is infinite, and ``math.exp(-inf)`` is 0.
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the mean of ``ours[i] - theirs[i]``. No round is left out."""
    found = [mine - base for mine, base in zip(ours, theirs, strict=True)]
    mean, half = fmean(found), _half_interval(found)
    return Difference(mean, mean - half, mean + half, len(found))


def _half_interval(values: Sequence[float]) -> float:
    """Return half the length of the 95 % interval of the mean."""
    if len(values) < 2:
        return math.inf
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
    return quantile * stdev(values) / math.sqrt(len(values))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of ``ordered`` lies; NaN without values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def costs_of(call: Callable[[int], object], calls: int, per: int = 1) -> list[float]:
    """Return the sorted microseconds of ``call(number)``, divided by its ``per`` items."""
    costs = []
    for number in range(calls):
        began = time.perf_counter()
        call(number)
        costs.append((time.perf_counter() - began) * 1e6 / per)
    return sorted(costs)


def cpu_per_task(trial: Trial) -> float:
    """Return CPU seconds per task, from the release to the last row in the brain.

    The agent keeps sending after the tasks have ended, and the worker itself uses CPU meanwhile.
    Therefore the CPU that the worker without an agent used in the same seconds is subtracted. That
    worker's average idle CPU is not used: under eventlet Celery's time-outs of two seconds wake
    the hub shortly after a batch and not at other times.
    """
    return (trial.cpu - trial.idle_host_cpu) / trial.tasks


def summary(rounds: Sequence[dict[str, Trial]]) -> dict[str, dict[str, Any]]:
    """Return the figures of each variant over the rounds that the variant and "off" completed."""
    found = {}
    for name in VARIANTS:
        both = [each for each in rounds if name in each and "off" in each]
        if both:
            found[name] = _variant(both, name)
    return found


def batch_cpu_ratio(rounds: Sequence[dict[str, Trial]], name: str, base: str) -> Ratio | None:
    """Return the CPU ratio of two agents, paired by batch; ``None`` if they share no round.

    Both values include the host's idle CPU, which is the same for both agents.
    """
    pairs = [
        pair
        for each in rounds
        if name in each and base in each
        for pair in zip(each[name].batch_cpu, each[base].batch_cpu, strict=True)
    ]
    return paired_ratio(*zip(*pairs, strict=True)) if pairs else None


@dataclass(frozen=True)
class Comparison:
    """The medians of a variant, and its ratios and differences paired by round.

    ``to_base`` and ``to_ours`` are ratios of CPU to the base, usually the worker without an agent,
    and to the worker with this agent. The differences are those to the base. ``arrived`` is
    ``None`` if the variant does not send successful tasks.
    """

    cpu_ms: float
    rss_mb: float
    pss_mb: float
    tasks: int
    arrived: int | None
    to_base: Ratio | None = None
    to_ours: Ratio | None = None
    added_rss_mb: Difference | None = None
    added_pss_mb: Difference | None = None

    def to_object(self) -> dict[str, Any]:
        """Return the comparison as JSON types."""
        return asdict(self)


def compare(
    rounds: Sequence[dict[str, Trial]], names: Sequence[str], base: str = "off"
) -> dict[str, Comparison]:
    """Return the figures of the variants ``names`` over all rounds."""

    def values(name: str, figure: Callable[[Trial], float]) -> list[float]:
        return [figure(each[name]) for each in rounds]

    def cpu_ratio(name: str, other: str) -> Ratio | None:
        if name == other or other not in names:
            return None
        return paired_ratio(values(name, cpu_per_task), values(other, cpu_per_task))

    def added(name: str, figure: Callable[[Trial], float]) -> Difference | None:
        if name == base or base not in names:
            return None
        return paired_difference(values(name, figure), values(base, figure))

    def arrived(name: str) -> int | None:
        counts = [each[name].rows for each in rounds]
        return None if None in counts else sum(count or 0 for count in counts)

    return {
        name: Comparison(
            cpu_ms=median(values(name, cpu_per_task)) * 1e3,
            rss_mb=median(values(name, _rss_mb)),
            pss_mb=median(values(name, _pss_mb)),
            tasks=sum(each[name].tasks for each in rounds),
            arrived=arrived(name),
            to_base=cpu_ratio(name, base),
            to_ours=cpu_ratio(name, "ours"),
            added_rss_mb=added(name, _rss_mb),
            added_pss_mb=added(name, _pss_mb),
        )
        for name in names
    }


def _rss_mb(trial: Trial) -> float:
    return trial.rss / 1e6


def _pss_mb(trial: Trial) -> float:
    return trial.pss / 1e6


def _variant(rounds: Sequence[dict[str, Trial]], name: str) -> dict[str, Any]:
    trials = [each[name] for each in rounds]

    def values(figure: Callable[[dict[str, Trial], str], float]) -> tuple[list[float], Ratio]:
        mine = [figure(each, name) for each in rounds]
        return mine, paired_ratio(mine, [figure(each, "off") for each in rounds])

    cpu, cpu_ratio = values(lambda each, who: cpu_per_task(each[who]))
    rate, rate_ratio = values(lambda each, who: each[who].tasks / each[who].tasks_seconds)
    lags = [[quantile(trial.hub_lags, share) for trial in trials] for share in (0.5, 0.99, 1.0)]
    delays = sorted(delay for trial in trials for delay in trial.row_delays)
    return {
        "rounds": len(trials),
        "cpu_ms": median(cpu) * 1e3,
        "cpu_ratio": cpu_ratio,
        "tasks_per_second": median(rate),
        "tasks_ratio": rate_ratio,
        "lag_p50_ms": median(lags[0]) * 1e3,
        "lag_p99_ms": median(lags[1]) * 1e3,
        "lag_max_ms": max(lags[2]) * 1e3,
        "idle_ms_per_s": median(trial.idle for trial in trials) * 1e3,
        "rss_mb": median(trial.rss for trial in trials) / 1e6,
        "pss_mb": median(trial.pss for trial in trials) / 1e6,
        "rows": [trial.rows for trial in trials],
        "last_row_s": median(
            (trial.end_seconds - trial.tasks_seconds) / trial.batches for trial in trials
        ),
        "row_delay_ms": [median(delays) * 1e3, delays[-1] * 1e3] if delays else None,
    }
