"""Output of a benchmark: a table on standard output, JSON and a picture in ``benchmarks/out``."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environments import OUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PACKAGES = (
    "z4j-bare",
    "z4j-core",
    "z4j-celery",
    "z4j",
    "celery",
    "gevent",
    "eventlet",
    "redis",
    "websocket-client",
)
_COLORS = {
    "off": "#9aa0a6",
    "ours": "#1a73e8",
    "scraped": "#669df6",
    "baseline": "#f9ab00",
    "existing": "#d93025",
    "opentelemetry": "#f9ab00",
    "ddtrace": "#632ca6",
    "sentry-errors": "#c58af9",
    "sentry-traces": "#7c4a8d",
    "events": "#34a853",
}
_LABELS = {
    "off": "no agent",
    "ours": "this agent",
    "scraped": "this agent, metrics scraped",
    "baseline": "other checkout",
    "existing": "existing agent",
    "opentelemetry": "OpenTelemetry",
    "ddtrace": "ddtrace",
    "sentry-errors": "sentry-sdk, errors",
    "sentry-traces": "sentry-sdk, traces",
    "events": "Celery's -E",
}
#: The measured values of the picture of ``host``, and their titles.
_HOST_PANELS = (
    ("cpu_ms", "worker CPU per task (ms)"),
    ("lag_p99_ms", "hub lag p99 (ms)"),
    ("rss_mb", "RSS (MB)"),
)


def circumstances() -> dict[str, Any]:
    """Return date, machine and versions, without which a figure cannot be compared."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_system()}",
        "python": platform.python_version(),
        "versions": versions,
        "load_before": os.getloadavg()[0],
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
    }


def save(name: str, content: Mapping[str, Any]) -> Path:
    """Write ``content`` to a JSON file with the time in its name; return its path."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns."""
    cells = [[str(each) for each in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def picture(
    path: Path,
    title: str,
    pools: Mapping[str, Mapping[str, Mapping[str, Any]]],
    panels: Sequence[tuple[str, str]] = _HOST_PANELS,
) -> None:
    """Draw bars of each variant in each pool; PNG or SVG by the suffix of ``path``.

    :param panels: the name of each measured value in ``pools``, and its title.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4))
    for panel, (key, label) in zip(axes, panels, strict=True):
        _bars(panel, key, label, pools)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="lower center", ncols=len(labels))
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(
    panel: Axes, key: str, label: str, pools: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    drawn = [name for name in _COLORS if any(name in figures for figures in pools.values())]
    width = 0.8 / len(drawn)
    for offset, variant in enumerate(drawn):
        heights = [figures.get(variant, {}).get(key, 0.0) for figures in pools.values()]
        places = [place + (offset - (len(drawn) - 1) / 2) * width for place in range(len(pools))]
        bars = panel.bar(
            places, heights, width * 0.93, color=_COLORS[variant], label=_LABELS[variant]
        )
        panel.bar_label(bars, fmt="%.3g", fontsize=7)
    panel.set_xticks(range(len(pools)), list(pools))
    panel.set_title(label)
    panel.spines[["top", "right"]].set_visible(False)


def _system() -> str:
    return f"{platform.system()} {platform.release()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
