"""The scripted scenario: the tasks that the script sends and the commands that it issues."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from z4j_bare.demo.poller import TERMINAL
from z4j_bare.demo.process import HarnessError, until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from celery import Celery

    from z4j_bare.demo.display import LineProgress
    from z4j_bare.demo.poller import BrainPoller
    from z4j_bare.demo.rest import BrainApi, Credentials, Row
    from z4j_bare.demo.task_log import TaskLog
    from z4j_bare.demo.worker import Worker

#: Pools that can terminate a running task. The other pools can only skip a task before its start.
TERMINATING_POOLS = frozenset({"gevent", "eventlet", "prefork"})

#: Kinds of tasks that the report refers to.
PLAIN = "plain"
RETRYING = "automatic retry"

#: Number of asyncio tasks, and of ORM tasks, that run one at a time.
SEQUENTIAL_TASKS = 5

#: Number of other tasks: two failing, one retried, one cancelled, one created by a retry command.
_OTHER_TASKS = 5

#: Countdown, in seconds, of the task that is cancelled before its start.
_COUNTDOWN = 6.0

#: Maximum seconds until the brain shows the first completed task.
_WARM_UP_TIMEOUT = 30.0

#: Maximum seconds of any other step. Steps that wait for all plain tasks have more time.
_TIMEOUT = 30.0

#: Minimum throughput of any pool, in plain tasks per second.
#: The slowest combination is the pool ``solo`` with messages in files.
_MIN_PLAIN_PER_SECOND = 20.0


@dataclass(frozen=True)
class Sent:
    """A task that the script sent, and its expected final state in the brain."""

    kind: str
    task_id: str
    expected: str


@dataclass
class Record:
    """The script's own record of the run. It contains no data from the agent."""

    sent: list[Sent] = field(default_factory=list)
    warm_up: list[str] = field(default_factory=list)
    warm_up_seconds: float = 0.0
    commands: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peers:
    """The processes and the clients that the scenario uses."""

    brain: BrainApi
    agent: Credentials
    worker: Worker
    poller: BrainPoller
    task_log: TaskLog
    producer: Celery
    home: Path


def has_django() -> bool:
    """Whether Django is installed. Without Django the script sends no ORM tasks."""
    return importlib.util.find_spec("django") is not None


def expected_total(plain: int) -> int:
    """Return the number of tasks of a run with ``plain`` plain tasks, without the warm-up."""
    return plain + SEQUENTIAL_TASKS + (SEQUENTIAL_TASKS if has_django() else 0) + _OTHER_TASKS


class Scenario:
    """Runs the script once.

    :param plain: the number of plain tasks.
    """

    def __init__(self, peers: Peers, plain: int, progress: LineProgress) -> None:
        self._peers = peers
        self._plain = plain
        self._progress = progress
        self._record = Record()
        self._batch_timeout = _TIMEOUT + plain / _MIN_PLAIN_PER_SECOND

    def run(self) -> Record:
        """Run all steps and return the record of sent tasks and issued commands.

        :raises HarnessError: the worker exited, or a step on which later steps depend timed out.
        """
        self._warm_up()
        self._send_batch()
        self._send_sequentially("asyncio.run", "demo.uses_asyncio")
        if has_django():
            self._send_sequentially("Django ORM", "demo.uses_orm")
        else:
            self._record.notes["Django ORM"] = "skipped: Django is not installed"
        # An operator can cancel or retry only tasks that the dashboard shows.
        self._wait_for_brain()
        self._cancel_task()
        self._retry_task()
        self._wait_for_brain()
        return self._record

    def _warm_up(self) -> None:
        """Send one task per second until the brain shows a completed task.

        The completed task proves that capture is active.
        """
        self._progress.stage("warming up")
        began = time.monotonic()

        def complete() -> bool:
            if time.monotonic() - began >= len(self._record.warm_up):
                self._record.warm_up.append(self._publish("demo.plain", 0))
            return any(self._is_complete(task_id) for task_id in self._record.warm_up)

        self._until(complete, "a complete task in the brain", _WARM_UP_TIMEOUT)
        self._record.warm_up_seconds = time.monotonic() - began

    def _is_complete(self, task_id: str) -> bool:
        row = self._peers.poller.rows.get(task_id)
        return row is not None and row["state"] == "success" and row["started_at"] is not None

    def _send_batch(self) -> None:
        self._progress.stage(f"running {self._plain} plain tasks, a failing and a retried task")
        sent = [self._send(PLAIN, "demo.plain", "success", number) for number in range(self._plain)]
        sent.append(self._send("failing", "demo.failing", "failure"))
        sent.append(self._send(RETRYING, "demo.retrying", "success"))
        self._wait_ended(sent, self._batch_timeout)

    def _send_sequentially(self, kind: str, name: str) -> None:
        """Run tasks one after another.

        The tasks do not overlap, because concurrent tasks of these kinds fail under greenlets even
        without an agent.
        """
        self._progress.stage(f"running {kind} tasks one at a time")
        for _ in range(SEQUENTIAL_TASKS):
            self._wait_ended([self._send(kind, name, "success")], _TIMEOUT)

    def _cancel_task(self) -> None:
        self._progress.stage("cancelling a task from the dashboard")
        if self._peers.worker.pool in TERMINATING_POOLS:
            task_id = self._send("cancelled while running", "demo.long", "revoked", _TIMEOUT)
            self._wait_state(task_id, {"started", *TERMINAL})
        else:
            kind = "cancelled before start"
            pool = self._peers.worker.pool
            self._record.notes[kind] = f"the {pool} pool cannot terminate a running task"
            task_id = self._send(kind, "demo.plain", "revoked", 0, countdown=_COUNTDOWN)
            self._wait_state(task_id, {"received", "started", *TERMINAL})
        self._command("cancel-task", task_id)
        self._wait_state(task_id, TERMINAL)

    def _retry_task(self) -> None:
        self._progress.stage("retrying a failed task from the dashboard")
        mark = str(self._peers.home / "failed-once")
        task_id = self._send("failing before retry", "demo.fails_once", "failure", mark)
        self._wait_state(task_id, TERMINAL)
        result = self._command("retry-task", task_id)["result"]
        retried = Sent("retried by operator", str((result or {}).get("new_task_id")), "success")
        self._record.sent.append(retried)
        if result:
            self._wait_ended([retried.task_id], _TIMEOUT)

    def _wait_for_brain(self) -> None:
        """Wait for a limited time until the brain shows all tasks as finished."""
        self._progress.stage("waiting for the brain")
        expected = {sent.task_id for sent in self._record.sent}
        self._try_until(
            lambda: expected <= self._peers.poller.first_finished.keys(), self._batch_timeout
        )

    def _send(self, kind: str, name: str, expected: str, *args: object, **options: object) -> str:
        task_id = self._publish(name, *args, **options)
        self._record.sent.append(Sent(kind, task_id, expected))
        return task_id

    def _publish(self, name: str, *args: object, **options: Any) -> str:
        return str(self._peers.producer.send_task(name, args=args, **options).id)

    def _command(self, route: str, task_id: str) -> Row:
        """Issue a command as an operator does, and return its row after it has finished."""
        brain, agent = self._peers.brain, self._peers.agent
        issued = brain.issue(
            agent.project, route, agent_id=agent.agent_id, engine="celery", task_id=task_id
        )
        self._record.commands.append(issued["id"])
        return brain.wait_command(agent.project, issued["id"])

    def _wait_ended(self, task_ids: Sequence[str], timeout: float) -> None:
        self._until(
            lambda: all(self._peers.task_log.ended(task_id) for task_id in task_ids),
            "the end of the tasks",
            timeout,
        )

    def _wait_state(self, task_id: str, states: set[str] | frozenset[str]) -> None:
        self._try_until(lambda: self._peers.poller.state(task_id) in states, _TIMEOUT)

    def _try_until(self, check: Callable[[], bool], timeout: float) -> None:
        """Wait for a condition. A timeout is ignored, because the report shows the missing task."""
        try:
            self._until(check, "", timeout)
        except HarnessError:
            if not self._peers.worker.running:
                raise

    def _until(self, check: Callable[[], bool], what: str, timeout: float) -> None:
        worker = self._peers.worker

        def check_with_worker() -> bool:
            if not worker.running:
                raise HarnessError(
                    f"{worker.title} exited with code {worker.exit_code}", log=worker.log
                )
            finished = self._peers.poller.first_finished
            self._progress.finished(sum(sent.task_id in finished for sent in self._record.sent))
            return check()

        try:
            until(check_with_worker, what, timeout=timeout)
        except HarnessError as exc:
            raise exc if exc.log else HarnessError(str(exc), log=worker.log) from None
