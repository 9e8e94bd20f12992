"""Compares the tasks that the script produced with the tasks that the brain shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from z4j_bare.demo.scenario import PLAIN, RETRYING, Peers, Record, Sent

if TYPE_CHECKING:
    from z4j_bare.demo.rest import Row

#: The result of ``demo.plain`` contains this text if the task sees no running loop.
_NO_LOOP = "no running loop"


@dataclass(frozen=True)
class Figure:
    """A line of the table: the count by the script and the count by the brain's REST API."""

    kind: str
    produced: int
    seen: int
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both counts are equal."""
        return self.produced == self.seen


@dataclass(frozen=True)
class Mismatch:
    """A task in an unexpected state; ``seen`` is ``None`` if the brain does not list the task."""

    task_id: str
    kind: str
    expected: str
    seen: str | None


@dataclass
class Report:
    """The result of a demo run. Times are in seconds."""

    pool: str
    broker: str
    figures: list[Figure]
    mismatches: list[Mismatch]
    agent: dict[str, Any]
    worker: dict[str, Any]
    warm_up: dict[str, float]
    slowest_delay: float | None
    slowest_kind: str | None
    seconds: float = 0.0
    dashboard: dict[str, str] | None = None
    directory: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all figures agree and there are no problems."""
        return (
            all(figure.agrees for figure in self.figures)
            and not self.mismatches
            and not self.problems
        )

    def to_object(self) -> dict[str, Any]:
        """Return the JSON object that ``--json`` prints."""
        figures = [{**asdict(figure), "agrees": figure.agrees} for figure in self.figures]
        return {"ok": self.ok, **asdict(self), "figures": figures}


def build_report(peers: Peers, record: Record, agent_at_work: Row, broker: str) -> Report:
    """Compare the record with the brain's data after the worker has stopped.

    :param agent_at_work: the agent's row, read while the worker was running.
    :param broker: the broker's address without a password.
    """
    project = peers.agent.project
    rows = {row["task_id"]: row for row in peers.brain.tasks(project)}
    delay, kind = _slowest_delay(peers, record)
    report = Report(
        pool=peers.worker.pool,
        broker=broker,
        figures=[
            *_by_kind(record, rows),
            _loop_figure(record, rows),
            _retries_figure(peers, record),
            _commands_figure(peers, record),
            _unknown_tasks_figure(record, rows),
        ],
        mismatches=[mismatch for sent in record.sent if (mismatch := _mismatch(sent, rows))],
        agent=_agent(peers, agent_at_work),
        worker=_worker(peers),
        warm_up={"sent": len(record.warm_up), "seconds": round(record.warm_up_seconds, 2)},
        slowest_delay=delay,
        slowest_kind=kind,
    )
    report.problems = _problems(report)
    return report


def _by_kind(record: Record, rows: dict[str, Row]) -> list[Figure]:
    kinds = dict.fromkeys([*(sent.kind for sent in record.sent), *record.notes])
    return [_kind_figure(kind, record, rows) for kind in kinds]


def _kind_figure(kind: str, record: Record, rows: dict[str, Row]) -> Figure:
    sent = [each for each in record.sent if each.kind == kind]
    seen = [each for each in sent if _mismatch(each, rows) is None]
    state = sent[0].expected if sent else ""
    return Figure(kind, len(sent), len(seen), record.notes.get(kind) or state)


def _loop_figure(record: Record, rows: dict[str, Row]) -> Figure:
    plain = [sent.task_id for sent in record.sent if sent.kind == PLAIN]
    seen = [task_id for task_id in plain if _NO_LOOP in str(rows.get(task_id, {}).get("result"))]
    return Figure("plain, no loop visible", len(plain), len(seen), "get_running_loop raised")


def _retries_figure(peers: Peers, record: Record) -> Figure:
    retrying = [sent.task_id for sent in record.sent if sent.kind == RETRYING]
    events = [
        event
        for task_id in retrying
        for event in peers.brain.events(peers.agent.project, "celery", task_id)
    ]
    retried = sum(event["kind"] == "task.retried" for event in events)
    return Figure("retry events", len(retrying), retried, "task.retried")


def _commands_figure(peers: Peers, record: Record) -> Figure:
    rows = [peers.brain.command(peers.agent.project, command_id) for command_id in record.commands]
    failed = [row for row in rows if row["status"] != "completed"]
    errors = "; ".join(f"{row['action']} {row['status']}: {row['error']}" for row in failed)
    return Figure("operator commands", len(rows), len(rows) - len(failed), errors or "completed")


def _unknown_tasks_figure(record: Record, rows: dict[str, Row]) -> Figure:
    known = {sent.task_id for sent in record.sent} | set(record.warm_up)
    return Figure("unknown tasks", 0, len(rows.keys() - known), "")


def _mismatch(sent: Sent, rows: dict[str, Row]) -> Mismatch | None:
    state = rows[sent.task_id]["state"] if sent.task_id in rows else None
    if state == sent.expected:
        return None
    return Mismatch(sent.task_id, sent.kind, sent.expected, state)


def _slowest_delay(peers: Peers, record: Record) -> tuple[float | None, str | None]:
    """Return the longest time from a task's end to its final state in the brain.

    The second value is that task's kind. The resolution of the time is the poll interval of 0.1 s.
    """
    delays = [
        (seen - ended, sent.kind)
        for sent in record.sent
        if (ended := peers.task_log.last_end(sent.task_id))
        and (seen := peers.poller.first_finished.get(sent.task_id))
    ]
    delay, kind = max(delays, default=(None, None))
    return (None if delay is None else round(delay, 3)), kind


def _agent(peers: Peers, at_work: Row) -> dict[str, Any]:
    row = peers.brain.agent(peers.agent.project, peers.agent.agent_id)
    return {
        "id": row["id"],
        "name": row["name"],
        "version": row["agent_version"],
        "version_status": row["version_status"],
        "state_at_work": at_work["state"],
        "state_afterwards": row["state"],
    }


def _worker(peers: Peers) -> dict[str, Any]:
    names = sorted(row["name"] for row in peers.brain.workers(peers.agent.project))
    return {"name": peers.worker.name, "seen": names, "exit_code": peers.worker.exit_code}


def _problems(report: Report) -> list[str]:
    problems = []
    if report.agent["state_at_work"] != "online":
        problems.append(f"the agent was {report.agent['state_at_work']} while the worker ran")
    if report.worker["seen"] != [report.worker["name"]]:
        problems.append(
            f"the brain lists the workers {report.worker['seen']} "
            f"instead of {report.worker['name']}"
        )
    if report.worker["exit_code"] != 0:
        problems.append(f"the worker exited with code {report.worker['exit_code']}")
    return problems
