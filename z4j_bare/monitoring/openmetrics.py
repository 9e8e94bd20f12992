"""Turns answers to the request ``metrics`` into metric families and into OpenMetrics text.

A metric with an equivalent in celery-exporter has the equivalent's name and labels.
Only types of the older Prometheus text format are used, because node_exporter reads that format.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

#: States of an agent: it has answered; its process runs but has not answered; its process has
#: ended.
LIVE, SILENT, GONE = "live", "silent", "gone"

#: The engine whose metrics have the names of celery-exporter.
CELERY = "celery"

#: Type and help of each family. A counter's sample has the suffix ``_total``.
FAMILIES = {
    "celery_task_received": ("counter", "Task messages that the worker received."),
    "celery_task_started": ("counter", "Runs that the worker started."),
    "celery_task_succeeded": ("counter", "Runs that succeeded."),
    "celery_task_failed": ("counter", "Runs that failed, by class of the exception."),
    "celery_task_retried": ("counter", "Runs that ended with a retry."),
    "celery_task_revoked": ("counter", "Tasks that were revoked, terminated or expired."),
    "celery_task_rejected": ("counter", "Messages that the worker rejected."),
    "celery_task_runtime": ("histogram", "Run time of the runs that succeeded, in seconds."),
    "celery_worker_up": ("gauge", "Whether the worker's process runs (1) or has ended (0)."),
    "celery_worker_tasks_active": ("gauge", "Tasks that the worker's pool has accepted."),
    "celery_queue_length": ("gauge", "Messages in the broker's queue, measured every 20 s."),
    "celery_active_worker_count": (
        "gauge",
        "Running workers of this Z4J_HOME that consume the queue.",
    ),
    "z4j_agent_task_start_delay_seconds": (
        "histogram",
        "Time from the arrival of a task message to the start of its run.",
    ),
    "z4j_agent_task_received": ("counter", "Task messages received, engines other than Celery."),
    "z4j_agent_task_started": ("counter", "Runs started, engines other than Celery."),
    "z4j_agent_task_succeeded": ("counter", "Runs that succeeded, engines other than Celery."),
    "z4j_agent_task_failed": ("counter", "Runs that failed, engines other than Celery."),
    "z4j_agent_task_retried": ("counter", "Runs that were retried, engines other than Celery."),
    "z4j_agent_task_revoked": ("counter", "Tasks that were revoked, engines other than Celery."),
    "z4j_agent_task_rejected": ("counter", "Messages rejected, engines other than Celery."),
    "z4j_agent_task_runtime_seconds": (
        "histogram",
        "Run time of the runs that succeeded, engines other than Celery.",
    ),
    "z4j_agent_queue_length": ("gauge", "Jobs in the queue, engines other than Celery."),
    "z4j_agent_up": ("gauge", "Whether the agent answered (1) or not (0)."),
    "z4j_agent_info": ("gauge", "Version, concurrency and transport of the agent; always 1."),
    "z4j_agent_connected": ("gauge", "Whether the agent has a session with the brain."),
    "z4j_agent_events_produced": ("counter", "Events that the agent captured."),
    "z4j_agent_events_stored": ("counter", "Events that the agent wrote to its buffer."),
    "z4j_agent_events_sent": ("counter", "Events that the agent sent, repetitions included."),
    "z4j_agent_events_acked": ("counter", "Events that the brain acknowledged."),
    "z4j_agent_events_lost": ("counter", "Events and rows that were lost, by reason."),
    "z4j_agent_buffered_rows": ("gauge", "Rows in the buffer that are not acknowledged."),
    "z4j_agent_buffer_bytes": ("gauge", "Bytes of the buffer on disk."),
    "z4j_agent_buffer_oldest_age_seconds": ("gauge", "Age of the oldest row in the buffer."),
    "z4j_agent_buffer_durable": ("gauge", "Whether the buffer is on disk (1) or in memory (0)."),
    "z4j_agent_buffer_failures": ("counter", "Failed operations of the buffer."),
    "z4j_agent_sessions": ("counter", "Sessions with the brain."),
    "z4j_agent_frames": ("counter", "Frames with events that were sent."),
    "z4j_agent_heartbeats": ("counter", "Heartbeats that were sent."),
    "z4j_agent_commands": ("counter", "Commands that the agent executed."),
    "z4j_agent_loop_restarts": ("counter", "Restarts of the agent's loops."),
    "z4j_agent_starts_unheard": ("counter", "Accepted tasks whose start was not captured."),
    "z4j_agent_hub_lag_seconds": (
        "histogram",
        "Lag of the hub; without a hub, the time that a thread waits to run.",
    ),
    "z4j_agent_task_names": ("gauge", "Task names that are counted apart, at most 1,000."),
}

#: Keys of a task's counters in an agent's answer. Each key is also the end of the metric's name.
_TASK_COUNTERS = ("received", "started", "succeeded", "retried", "revoked", "rejected")

#: Metrics by their key in an agent's status.
_COUNTERS = {
    "produced": "z4j_agent_events_produced",
    "stored": "z4j_agent_events_stored",
    "sent": "z4j_agent_events_sent",
    "acked": "z4j_agent_events_acked",
    "buffer_failures": "z4j_agent_buffer_failures",
    "sessions": "z4j_agent_sessions",
    "frames": "z4j_agent_frames",
    "heartbeats": "z4j_agent_heartbeats",
    "commands": "z4j_agent_commands",
    "starts_unheard": "z4j_agent_starts_unheard",
}
_GAUGES = {
    "connected": "z4j_agent_connected",
    "buffered": "z4j_agent_buffered_rows",
    "buffer_bytes": "z4j_agent_buffer_bytes",
    "oldest_age_seconds": "z4j_agent_buffer_oldest_age_seconds",
    "buffer_durable": "z4j_agent_buffer_durable",
}

#: Loss reasons that are shown even without a loss, because an alert needs an existing series.
_LOSS_REASONS = ("ring", "channel", "unencodable", "uncaptured")

#: Text after the worker's name in the label of a second process with this name.
_PID = " (pid "

Labels = dict[str, str]
Answer = Mapping[str, Any]


class Snapshot(NamedTuple):
    """The last answer of an agent and the agent's state, such as :data:`LIVE`."""

    answer: Answer
    state: str

    @property
    def name(self) -> str:
        """The name of an agent whose process is not a worker."""
        return f"{self.answer['adapter']}@{self.answer['host']}-{self.answer['pid']}"

    @property
    def project(self) -> str:
        """The project of the agent."""
        return str(self.answer["status"].get("project") or "")


class Sample(NamedTuple):
    """One line of a family. ``suffix`` follows the family's name."""

    suffix: str
    labels: Labels
    value: float


@dataclass
class Family:
    """A metric family with its samples."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    _seen: set[tuple[str, ...]] = field(default_factory=set)

    @property
    def type(self) -> str:
        """The type: ``counter``, ``gauge`` or ``histogram``."""
        return FAMILIES[self.name][0]

    @property
    def help(self) -> str:
        """The description."""
        return FAMILIES[self.name][1]

    def is_new(self, labels: Labels) -> bool:
        """Record the labels; return whether they are new. No two samples may have equal labels."""
        key = tuple(labels.values())
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


class Families(dict[str, Family]):
    """Collects the samples of all families."""

    def gauge(self, name: str, labels: Labels, value: float) -> None:
        """Add a value."""
        family = self._family(name)
        if family.is_new(labels):
            family.samples.append(Sample("", labels, value))

    def counter(self, name: str, labels: Labels, value: float, created: float) -> None:
        """Add a count that was zero at ``created``, in seconds since the epoch."""
        family = self._family(name)
        if family.is_new(labels):
            family.samples.append(Sample("_total", labels, value))
            family.samples.append(Sample("_created", labels, created))

    def histogram(
        self,
        name: str,
        labels: Labels,
        bounds: Sequence[float],
        counts: Sequence[int],
        total: float,
        created: float,
    ) -> None:
        """Add a histogram.

        :param counts: a number for each bound, and one for the values above the last bound.
        :param total: the sum of all values.
        """
        family = self._family(name)
        if not family.is_new(labels):
            return
        number = 0
        for bound, number in zip((*bounds, math.inf), accumulate(counts), strict=True):
            le = "+Inf" if bound == math.inf else repr(float(bound))
            family.samples.append(Sample("_bucket", {**labels, "le": le}, number))
        family.samples += [
            Sample("_count", labels, number),
            Sample("_sum", labels, total),
            Sample("_created", labels, created),
        ]

    def _family(self, name: str) -> Family:
        return self.setdefault(name, Family(name))


class Workers:
    """Decides which agent reports a worker, so that no task is counted twice.

    The agent in a worker's process precedes agents that read the worker's events from the broker.
    If two running processes have one worker name, the younger process gets the plain name, and the
    label of the older process contains its pid. An ended process is shown until another process has
    the same worker name.
    """

    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        self._best: dict[tuple[str, str, str], tuple[tuple[int, float], Snapshot]] = {}
        for snapshot in snapshots:
            for engine in snapshot.answer["engines"]:
                for worker in {engine["worker"], *engine["workers"]} - {None}:
                    self._claim(snapshot, engine["engine"], worker)
            for row in snapshot.answer["tasks"]:
                if row["worker"] is not None:
                    self._claim(snapshot, row["engine"], row["worker"])

    def label(self, snapshot: Snapshot, engine: str, worker: str | None) -> str | None:
        """Return the label of a worker; ``None`` if another agent reports the worker.

        :param worker: ``None`` for the tasks of a process that is not a worker.
        """
        if worker is None:
            worker = own_worker(snapshot, engine)
        if worker is None:
            return snapshot.name
        if self._best[snapshot.project, engine, worker][1] is snapshot:
            return worker
        if snapshot.state != GONE and own_worker(snapshot, engine) == worker:
            return f"{worker}{_PID}{snapshot.answer['pid']} on {snapshot.answer['host']})"
        return None

    def _claim(self, snapshot: Snapshot, engine: str, worker: str) -> None:
        own, gone = own_worker(snapshot, engine) == worker, snapshot.state == GONE
        created = float(snapshot.answer["created"])
        rank = (gone, -created) if own else (2 + gone, created)
        key = (snapshot.project, engine, worker)
        if key not in self._best or rank < self._best[key][0]:
            self._best[key] = (rank, snapshot)


def own_worker(snapshot: Snapshot, engine: str) -> str | None:
    """Return the name of the agent's own worker of this engine; ``None`` if it has none."""
    for each in snapshot.answer["engines"]:
        if each["engine"] == engine:
            worker: str | None = each["worker"]
            return worker
    return None


def families_of(snapshots: Sequence[Snapshot]) -> list[Family]:
    """Return the metric families of some agents, in the order of :data:`FAMILIES`."""
    families, workers = Families(), Workers(snapshots)
    for snapshot in snapshots:
        _add_agent(families, snapshot, workers)
        for row, label in _sum_by_label(snapshot, workers):
            _add_task(families, snapshot, row, label)
        for engine in snapshot.answer["engines"]:
            _add_workers(families, snapshot, engine, workers)
    _add_queues(families, [each for each in snapshots if each.state != GONE])
    return sorted(families.values(), key=lambda family: _ORDER[family.name])


_ORDER = {name: number for number, name in enumerate(FAMILIES)}


def _sum_by_label(snapshot: Snapshot, workers: Workers) -> Iterator[tuple[Answer, str]]:
    """Yield the rows of the tasks, each with the label of its worker.

    Rows with the same engine, label, task name and queue are summed.
    """
    found: dict[tuple[str, str, str, str | None], Answer] = {}
    for row in snapshot.answer["tasks"]:
        label = workers.label(snapshot, row["engine"], row["worker"])
        if label is not None:
            key = (row["engine"], label, row["name"], row["queue"])
            found[key] = _add_rows(found[key], row) if key in found else row
    for (_, label, _, _), row in found.items():
        yield row, label


def _add_rows(first: Answer, second: Answer) -> Answer:
    row = dict(first)
    for key, value in second.items():
        if isinstance(value, dict):
            row[key] = Counter(first[key]) + Counter(value)
        elif isinstance(value, list):
            row[key] = [one + other for one, other in zip(first[key], value, strict=True)]
        elif isinstance(value, int | float):
            row[key] = first[key] + value
    return row


def _add_task(families: Families, snapshot: Snapshot, row: Answer, worker: str) -> None:
    answer, celery = snapshot.answer, row["engine"] == CELERY
    created = answer["created"]
    labels = {
        "name": row["name"],
        "queue_name": row["queue"] or "",
        "hostname": _hostname(snapshot, worker),
        "worker": worker,
        "project": snapshot.project,
    }
    with_engine = {"engine": row["engine"], **labels}
    prefix = "celery_task" if celery else "z4j_agent_task"
    labels = labels if celery else with_engine
    for kind in _TASK_COUNTERS:
        families.counter(f"{prefix}_{kind}", labels, row[kind], created)
    # Like celery-exporter, show a zero without a class, so that the first failure is an increase.
    for exception, number in {"": 0, **row["failed"]}.items():
        families.counter(f"{prefix}_failed", {**labels, "exception": exception}, number, created)
    families.histogram(
        "celery_task_runtime" if celery else "z4j_agent_task_runtime_seconds",
        labels,
        answer["runtime_bounds"],
        row["runtimes"],
        row["runtime_seconds"],
        created,
    )
    if any(row["delays"]):
        families.histogram(
            "z4j_agent_task_start_delay_seconds",
            with_engine,
            answer["delay_bounds"],
            row["delays"],
            row["delay_seconds"],
            created,
        )


def _add_workers(families: Families, snapshot: Snapshot, engine: Answer, workers: Workers) -> None:
    if engine["engine"] != CELERY:
        return
    own, gone = engine["worker"], snapshot.state == GONE
    for worker in engine["workers"]:
        label = workers.label(snapshot, CELERY, worker)
        if label is None or (gone and worker != own):
            continue
        labels = {
            "hostname": _hostname(snapshot, label),
            "worker": label,
            "project": snapshot.project,
        }
        families.gauge("celery_worker_up", labels, not gone)
        if worker == own and engine["running"] is not None:
            running = 0 if gone else engine["running"]
            families.gauge("celery_worker_tasks_active", labels, running)


def _add_queues(families: Families, snapshots: Iterable[Snapshot]) -> None:
    for (project, engine, queue), depth in _queue_lengths(snapshots).items():
        labels = {"queue_name": queue, "project": project}
        if engine == CELERY:
            families.gauge("celery_queue_length", labels, depth)
        else:
            families.gauge("z4j_agent_queue_length", {"engine": engine, **labels}, depth)
    consumers = Counter(
        (snapshot.project, queue)
        for snapshot in snapshots
        for engine in snapshot.answer["engines"]
        for queue in engine["queues"]
        if engine["engine"] == CELERY
    )
    for (project, queue), number in consumers.items():
        labels = {"queue_name": queue, "project": project}
        families.gauge("celery_active_worker_count", labels, number)


def _queue_lengths(snapshots: Iterable[Snapshot]) -> dict[tuple[str, str, str], int]:
    """Return the depth of each queue by project, engine and name.

    Agents measure a queue at different times. The largest depth is used.
    """
    lengths: dict[tuple[str, str, str], int] = {}
    for snapshot in snapshots:
        for engine, depths in snapshot.answer["queues"].items():
            for queue, depth in depths.items():
                key = (snapshot.project, engine, queue)
                lengths[key] = max(depth, lengths.get(key, 0))
    return lengths


def _add_agent(families: Families, snapshot: Snapshot, workers: Workers) -> None:
    answer, label = snapshot.answer, _agent_label(snapshot, workers)
    if label is None:
        return
    status, created = answer["status"], answer["created"]
    labels = {
        "adapter": answer["adapter"],
        "hostname": _hostname(snapshot, label),
        "worker": label,
        "project": snapshot.project,
    }
    families.gauge("z4j_agent_up", labels, snapshot.state == LIVE)
    info = {key: str(status.get(key) or "") for key in ("version", "concurrency", "transport")}
    families.gauge("z4j_agent_info", {**labels, **info}, 1)
    if snapshot.state != GONE:
        for key, name in _GAUGES.items():
            families.gauge(name, labels, status[key] or 0)
        families.gauge("z4j_agent_task_names", labels, answer["task_names"])
    for key, name in _COUNTERS.items():
        families.counter(name, labels, status[key], created)
    for reason, number in {**dict.fromkeys(_LOSS_REASONS, 0), **status["lost"]}.items():
        families.counter("z4j_agent_events_lost", {**labels, "reason": reason}, number, created)
    restarts = sum(status["restarts"].values())
    families.counter("z4j_agent_loop_restarts", labels, restarts, created)
    lag = answer["lag"]
    families.histogram(
        "z4j_agent_hub_lag_seconds",
        labels,
        [float(bound) for bound in lag["histogram"] if bound != "inf"],
        list(lag["histogram"].values()),
        lag["total_seconds"],
        created,
    )


def _agent_label(snapshot: Snapshot, workers: Workers) -> str | None:
    """Return the name of the agent's own worker, or a name that contains host and pid."""
    for engine in snapshot.answer["engines"]:
        if engine["worker"] is not None:
            return workers.label(snapshot, engine["engine"], engine["worker"])
    return snapshot.name


def silent_agent(adapter: str, pid: int) -> Labels:
    """Return the labels of an agent that has never answered."""
    return {"adapter": adapter, "hostname": "", "worker": f"{adapter}-{pid}", "project": ""}


def _hostname(snapshot: Snapshot, label: str) -> str:
    """Return the label ``hostname``: the text after the first ``@``, as in celery-exporter."""
    if label == snapshot.name:
        return str(snapshot.answer["host"])
    worker = label.partition(_PID)[0]
    return worker.partition("@")[2] or worker


def render(families: Iterable[Family]) -> str:
    """Return the OpenMetrics text of some families."""
    return "".join(f"{line}\n" for line in _lines(families))


def _lines(families: Iterable[Family]) -> Iterator[str]:
    for family in families:
        yield f"# HELP {family.name} {family.help}"
        yield f"# TYPE {family.name} {family.type}"
        for sample in family.samples:
            labels = ",".join(f'{key}="{_escape(value)}"' for key, value in sample.labels.items())
            yield f"{family.name}{sample.suffix}{{{labels}}} {float(sample.value)!r}"
    yield "# EOF"


def _escape(value: str) -> str:
    return valid_text(value).replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def valid_text(value: str) -> str:
    """Return a label's value with lone surrogates replaced, because UTF-8 cannot contain them."""
    return value.encode(errors="replace").decode()
