"""What was produced against what the brain shows, as figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from z4j_bare.demo.scenario import PLAIN, RETRYING, Peers, Record, Sent

if TYPE_CHECKING:
    from z4j_bare.demo.rest import Row

_NO_LOOP = "no running loop"  # what demo.plain returns


@dataclass(frozen=True)
class Figure:
    """One line of the table: ``produced`` by the script's own list, ``seen`` in the brain's REST API."""

    kind: str
    produced: int
    seen: int
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both sides tell the same."""
        return self.produced == self.seen


@dataclass(frozen=True)
class Mismatch:
    """A task that the brain shows in another state than it must have; ``None`` when it has no row of it."""

    task_id: str
    kind: str
    expected: str
    seen: str | None


@dataclass
class Report:
    """The whole outcome of one demo. Times are seconds."""

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
        """Whether every figure agrees and both peers were in order."""
        return (
            all(figure.agrees for figure in self.figures)
            and not self.mismatches
            and not self.problems
        )

    def to_object(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        figures = [{**asdict(figure), "agrees": figure.agrees} for figure in self.figures]
        return {"ok": self.ok, **asdict(self), "figures": figures}


def build_report(peers: Peers, record: Record, agent_at_work: Row, broker: str) -> Report:
    """Ask the brain for everything, now that the worker has stopped, and compare.

    ``agent_at_work`` is the agent's row as it was while the worker still ran.
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
    sent = [one for one in record.sent if one.kind == kind]
    seen = [one for one in sent if _mismatch(one, rows) is None]
    state = sent[0].expected if sent else ""
    return Figure(kind, len(sent), len(seen), record.notes.get(kind) or state)


def _loop_figure(record: Record, rows: dict[str, Row]) -> Figure:
    plain = [sent.task_id for sent in record.sent if sent.kind == PLAIN]
    free = [task_id for task_id in plain if _NO_LOOP in str(rows.get(task_id, {}).get("result"))]
    return Figure("plain, no loop visible", len(plain), len(free), "get_running_loop raised")


def _retries_figure(peers: Peers, record: Record) -> Figure:
    retrying = [sent.task_id for sent in record.sent if sent.kind == RETRYING]
    events = [
        event
        for task_id in retrying
        for event in peers.brain.events(peers.agent.project, "celery", task_id)
    ]
    retried = sum(event["kind"] == "task.retried" for event in events)
    return Figure("retries", len(retrying), retried, "task.retried")


def _commands_figure(peers: Peers, record: Record) -> Figure:
    rows = [peers.brain.command(peers.agent.project, command_id) for command_id in record.commands]
    failed = [row for row in rows if row["status"] != "completed"]
    note = (
        "; ".join(f"{row['action']} {row['status']}: {row['error']}" for row in failed)
        or "completed"
    )
    return Figure("operator's commands", len(rows), len(rows) - len(failed), note)


def _unknown_tasks_figure(record: Record, rows: dict[str, Row]) -> Figure:
    known = {sent.task_id for sent in record.sent} | set(record.warm_up)
    return Figure("sent by nobody", 0, len(rows.keys() - known), "")


def _mismatch(sent: Sent, rows: dict[str, Row]) -> Mismatch | None:
    state = rows[sent.task_id]["state"] if sent.task_id in rows else None
    return (
        None if state == sent.expected else Mismatch(sent.task_id, sent.kind, sent.expected, state)
    )


def _slowest_delay(peers: Peers, record: Record) -> tuple[float | None, str | None]:
    """Return the longest time from a task's own end to its first sight in the brain, by polls 0.1 s apart."""
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
            f"the brain lists the workers {report.worker['seen']}, not {report.worker['name']}"
        )
    if report.worker["exit_code"] != 0:
        problems.append(f"the worker ended with code {report.worker['exit_code']}")
    return problems
