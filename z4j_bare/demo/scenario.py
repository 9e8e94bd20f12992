"""The scripted day: what is sent to the worker, and what an operator does meanwhile."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from z4j_bare.demo.poller import TERMINAL
from z4j_bare.demo.process import HarnessError, until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from celery import Celery

    from z4j_bare.demo.poller import BrainPoller
    from z4j_bare.demo.rest import BrainApi, Credentials, Row
    from z4j_bare.demo.task_log import TaskLog
    from z4j_bare.demo.worker import Worker

#: Pools that can end a running task; the others only skip one that has not begun.
TERMINATING_POOLS = frozenset({"gevent", "eventlet", "prefork"})
PLAIN = "plain"
RETRYING = "retrying by itself"
SEQUENTIAL_TASKS = 5  # how many asyncio tasks and how many ORM tasks, one at a time
_OTHER_TASKS = 5  # failing, retrying, cancelled, failed, retried by the operator
_ETA_SECONDS = 6.0
_WARM_UP_SECONDS = 30.0
_TIMEOUT = 30.0
_PLAIN_PER_SECOND = 20.0  # slower than any pool, solo on files included


class Progress(Protocol):
    """Whoever shows how far the day has come."""

    def stage(self, text: str) -> None:
        """Say what happens now."""

    def seen(self, count: int) -> None:
        """Say how many tasks the brain shows as finished."""


@dataclass(frozen=True)
class Sent:
    """One task that the script produced, and the state it must have in the brain in the end."""

    kind: str
    task_id: str
    expected: str


@dataclass
class Record:
    """The script's own account of the day: nothing in it comes from the agent."""

    sent: list[Sent] = field(default_factory=list)
    warm_up: list[str] = field(default_factory=list)
    warm_up_seconds: float = 0.0
    commands: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peers:
    """Everything that runs while the day goes on."""

    brain: BrainApi
    agent: Credentials
    worker: Worker
    poller: BrainPoller
    task_log: TaskLog
    producer: Celery
    home: Path


def has_django() -> bool:
    """Whether the ORM takes part."""
    return importlib.util.find_spec("django") is not None


def expected_total(plain: int) -> int:
    """Return how many tasks a day with so many plain ones has, without the warm-up."""
    return plain + SEQUENTIAL_TASKS + (SEQUENTIAL_TASKS if has_django() else 0) + _OTHER_TASKS


class Scenario:
    """Runs the script once, with ``plain`` plain tasks; ``run`` returns the record.

    Raises ``HarnessError`` when the worker dies or something that everything else stands on never comes.
    """

    def __init__(self, peers: Peers, plain: int, progress: Progress) -> None:
        self._peers = peers
        self._plain = plain
        self._progress = progress
        self._record = Record()
        self._batch_timeout = _TIMEOUT + plain / _PLAIN_PER_SECOND

    def run(self) -> Record:
        """Go through the day and return what was sent and issued."""
        self._warm_up()
        self._send_batch()
        self._one_at_a_time("asyncio.run", "demo.uses_asyncio")
        if has_django():
            self._one_at_a_time("Django ORM", "demo.uses_orm")
        else:
            self._record.notes["Django ORM"] = "left out: Django is not installed"
        self._wait_for_brain()  # an operator acts on what the dashboard shows, and a task to cancel does not wait
        self._operator_cancels()
        self._operator_retries()
        self._wait_for_brain()
        return self._record

    def _warm_up(self) -> None:
        """Send tasks until one is complete in the brain: prefork's broker events are switched on late."""
        self._progress.stage("warming up")
        began = time.monotonic()

        def complete() -> bool:
            if time.monotonic() - began >= len(self._record.warm_up):
                self._record.warm_up.append(self._publish("demo.plain", 0))
            return any(self._is_complete(task_id) for task_id in self._record.warm_up)

        self._until(complete, "a complete task in the brain", _WARM_UP_SECONDS)
        self._record.warm_up_seconds = time.monotonic() - began

    def _is_complete(self, task_id: str) -> bool:
        row = self._peers.poller.rows.get(task_id)
        return row is not None and row["state"] == "success" and row["started_at"] is not None

    def _send_batch(self) -> None:
        self._progress.stage(f"{self._plain} plain tasks, one that fails, one that retries")
        sent = [self._send(PLAIN, "demo.plain", "success", number) for number in range(self._plain)]
        sent.append(self._send("failing", "demo.failing", "failure"))
        sent.append(self._send(RETRYING, "demo.retrying", "success"))
        self._wait_ended(sent, self._batch_timeout)

    def _one_at_a_time(self, kind: str, name: str) -> None:
        """Overlapping ones collide in gevent and eventlet without any agent too."""
        self._progress.stage(f"{kind}, one at a time")
        for _ in range(SEQUENTIAL_TASKS):
            self._wait_ended([self._send(kind, name, "success")], _TIMEOUT)

    def _operator_cancels(self) -> None:
        self._progress.stage("an operator cancels a task")
        if self._peers.worker.pool in TERMINATING_POOLS:
            task_id = self._send("cancelled while running", "demo.long", "revoked", _TIMEOUT)
            self._wait_state(task_id, {"started", *TERMINAL})
        else:
            kind = "cancelled before its ETA"
            self._record.notes[kind] = f"{self._peers.worker.pool} cannot end a running task"
            task_id = self._send(kind, "demo.plain", "revoked", 0, countdown=_ETA_SECONDS)
            self._wait_state(task_id, {"received", "started", *TERMINAL})
        self._command("cancel-task", task_id)
        self._wait_state(task_id, TERMINAL)

    def _operator_retries(self) -> None:
        self._progress.stage("an operator retries a failed task")
        mark = str(self._peers.home / "failed-once")
        task_id = self._send("failing until retried", "demo.fails_once", "failure", mark)
        self._wait_state(task_id, TERMINAL)
        result = self._command("retry-task", task_id)["result"]
        again = Sent("retried by the operator", str((result or {}).get("new_task_id")), "success")
        self._record.sent.append(again)
        if result:
            self._wait_ended([again.task_id], _TIMEOUT)

    def _wait_for_brain(self) -> None:
        """Give it time to show what was sent so far; what is missing then will be missing in the table."""
        self._progress.stage("waiting for the brain")
        waiting = {sent.task_id for sent in self._record.sent}
        self._try_until(
            lambda: waiting <= self._peers.poller.first_finished.keys(), self._batch_timeout
        )

    def _send(self, kind: str, name: str, expected: str, *args: Any, **options: Any) -> str:
        task_id = self._publish(name, *args, **options)
        self._record.sent.append(Sent(kind, task_id, expected))
        return task_id

    def _publish(self, name: str, *args: Any, **options: Any) -> str:
        return str(self._peers.producer.send_task(name, args=args, **options).id)

    def _command(self, route: str, task_id: str) -> Row:
        """Issue a command as the operator does and return its row once it is finished."""
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
        """Wait for something that the table will show as missing should it not come."""
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
                    f"{worker.title} ended with code {worker.exit_code}", log=worker.log
                )
            finished = self._peers.poller.first_finished
            self._progress.seen(sum(sent.task_id in finished for sent in self._record.sent))
            return check()

        try:
            until(check_with_worker, what, timeout=timeout)
        except HarnessError as exc:
            raise exc if exc.log else HarnessError(str(exc), log=worker.log) from None
