"""Differences in what the brain records of one scripted day under the existing agent and this one.

Workers, broker and brain are real; each agent has a project of its own. Tasks have fixed ids, so
only times and the agents' behaviour can differ. Every difference is printed with its reason; a
difference without a reason is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import z4j_bare
from benchmarks.environments import existing_python
from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.rest import BrainRefusedError
from z4j_bare.demo.worker import POOLS, Worker

INSIDE = Path(__file__).with_name("inside")
VARIANTS = ("existing", "ours")
NAME = "w1@parity"
#: Seconds for a task to reach its final state in the brain. Later states are not waited for.
_TASK_TIMEOUT = 20.0
#: Seconds to wait for late events.
_SETTLE = 6.0

#: Task id, name, arguments, keyword arguments.
TASKS: tuple[tuple[str, str, list[Any], dict[str, Any]], ...] = (
    ("add", "shop.add", [1, 2], {}),
    ("fails", "shop.fails", ["broken"], {}),
    ("retries", "shop.retries", ["at last"], {}),
    ("greets", "shop.greets", ["Ada"], {"password": "hunter2", "mail": "ada@example.com"}),
    ("parent", "shop.parent", [], {}),
)
#: Label, route, body.
COMMANDS = (
    ("retry", "retry-task", {"engine": "celery", "task_id": "fails"}),
    (
        "retry changed",
        "retry-task",
        {"engine": "celery", "task_id": "add", "override_args": [3, 4], "override_kwargs": {}},
    ),
    ("cancel", "cancel-task", {"engine": "celery", "task_id": "waits"}),
    ("rate limit", "rate-limit", {"task_name": "shop.greets", "rate": "100/s"}),
    ("grow", "pool-resize", {"worker_name": NAME, "delta": 1, "engine": "celery"}),
    ("consume", "add-consumer", {"worker_name": NAME, "queue": "more", "engine": "celery"}),
    (
        "consume no more",
        "cancel-consumer",
        {"worker_name": NAME, "queue": "more", "engine": "celery"},
    ),
    ("purge", "purge-queue", {"queue": "idle", "force": True}),
    ("cancel nothing", "cancel-task", {"engine": "celery", "task_id": "never-was"}),
)

#: Compared fields: ``_TASK`` of a task's row, ``_AGENT`` of an agent's row. The fields of a task in
#: ``_PRESENCE`` are only compared as present or absent.
_TASK = (
    "name",
    "queue",
    "state",
    "priority",
    "args",
    "kwargs",
    "result",
    "exception",
    "retry_count",
    "worker_name",
)
_PRESENCE = (
    "received_at",
    "started_at",
    "finished_at",
    "runtime_ms",
    "traceback",
    "parent_task_id",
    "root_task_id",
)
_AGENT = (
    "state",
    "framework_adapter",
    "engine_adapters",
    "scheduler_adapters",
    "capabilities",
    "protocol_version",
)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

#: Known differences: patterns of pool and path, and the reason.
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "*",
        "task *: worker_name",
        "ours names the worker in each event; the brain clears it when one does not",
    ),
    ("*", "task *: runtime_ms", "ours reports the run time with the end"),
    ("*", "task retries: retry_count", "ours reports the count with the retry"),
    ("*", "task retries: events", "ours reports the receipt of each attempt"),
    (
        "*",
        "task *: result",
        "ours reports the value, redacted by key; the other reports Celery's text with its secrets",
    ),
    (
        "*",
        "task waits: *",
        "ours reports a terminated task as revoked only, not also as succeeded",
    ),
    ("*", "other tasks", "ours reports the end of the retried task"),
    ("*", "queues", "ours executes add-consumer"),
    ("*", "agent: processes", "ours reports the role of the process"),
    (
        "*",
        "command cancel*: *",
        "ours reports the workers' answers and the effect",
    ),
    ("*", "command rate limit: *", "ours names the workers that applied it"),
    ("*", "command grow: *", "ours announces its worker, which the brain requires"),
    ("*", "command consume*: *", "ours announces its worker, which the brain requires"),
)
#: Reason of a difference in any task's events that occurs at random, because the brain merges
#: duplicates only within one second.
DUPLICATED = (
    "ours reports an event once; the other by signal and by the broker, here in different seconds"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS))


def run(args: argparse.Namespace) -> None:
    """Run the script in each pool under each agent.

    Raises ``HarnessError`` for a difference without a known reason.
    """
    content = circumstances()
    differences: list[Difference] = []
    with Peers() as peers:
        for pool in args.pools:
            found = {variant: _Day(peers, variant, pool).record() for variant in VARIANTS}
            content[pool] = found
            differences += _compare(pool, found)
    print(table(("pool", "what", *VARIANTS, "reason"), [each.line() for each in differences]))
    print(f"saved {save('parity', content)}")
    if unexplained := [each for each in differences if not each.reason]:
        raise HarnessError(f"{len(unexplained)} of {len(differences)} differences are unexplained")


@dataclass
class Difference:
    """One value that the brain recorded differently."""

    pool: str
    path: str
    existing: Any
    ours: Any
    reason: str = field(init=False)

    def __post_init__(self) -> None:
        matching = (
            reason
            for pool, path, reason in REASONS
            if fnmatchcase(self.pool, pool) and fnmatchcase(self.path, path)
        )
        self.reason = next(matching, DUPLICATED if self._is_duplicated() else "")

    def _is_duplicated(self) -> bool:
        """Whether the existing agent reported the same events of a task, some of them twice."""
        if not self.path.endswith(": events") or self.existing.keys() != self.ours.keys():
            return False
        return all(self.existing[kind] >= count for kind, count in self.ours.items())

    def line(self) -> tuple[str, ...]:
        """Return the table line."""
        return (
            self.pool,
            self.path,
            *(f"{value!r:.60}" for value in (self.existing, self.ours)),
            self.reason or "UNEXPLAINED",
        )


class _Day:
    """One worker with one agent, from its start to the last command."""

    def __init__(self, peers: Peers, variant: str, pool: str) -> None:
        self._peers, self._variant, self._pool = peers, variant, pool
        self._brain = peers.brain
        self._agent = peers.new_agent(f"parity-{pool}-{variant}")
        self._home = peers.home / f"parity-{pool}-{variant}"
        self._home.mkdir()

    def record(self) -> dict[str, Any]:
        """Run the day; return what the brain has in the end, by path."""
        progress(f"{self._pool}, {self._variant}")
        self._peers.purge()
        with self._worker(), self._producer() as producer:
            until(self._online, f"the session of the {self._variant} agent", timeout=40.0)
            time.sleep(_SETTLE)  # both agents have enabled the worker's events by then
            for task_id, name, args, kwargs in TASKS:
                producer.send_task(name, args=args, kwargs=kwargs, task_id=task_id, queue="parity")
            self._await("add", "fails", "retries", "greets", "parent", "parent-child")
            if self._pool != "solo":  # a solo worker receives no command while it runs a task
                producer.send_task("shop.waits", args=[60], task_id="waits", queue="parity")
                self._await("waits", states=("started",))
            producer.send_task("shop.add", args=[0, 0], task_id="idle", queue="idle")
            commands = {label: self._command(route, body) for label, route, body in COMMANDS}
            time.sleep(_SETTLE)
            return {
                **self._tasks(),
                **self._others(),
                **self._workers(),
                **self._agents(),
                **commands_by_path(commands),
            }

    def _worker(self) -> Worker:
        python = existing_python() if self._variant == "existing" else sys.executable
        folders = [str(INSIDE)]
        if self._variant == "ours":
            folders.append(str(Path(z4j_bare.__file__).parents[1]))
        environment = {
            "PARITY_BROKER": self._peers.broker(),
            "PYTHONPATH": os.pathsep.join(folders),
            "PYTHONWARNINGS": "ignore",
            **self._agent.env(self._home / "agent"),
        }
        worker = Worker(
            "parity_app",
            pool=self._pool,
            log=self._home / "worker.log",
            environment=environment,
            concurrency=None if self._pool == "solo" else 4,
            name=NAME,
            options=["-E"],
            python=python,
        )
        worker.start()
        return worker

    @contextmanager
    def _producer(self) -> Iterator[Any]:
        from celery import Celery

        app = Celery(
            "parity_producer", broker=self._peers.broker(), changes={"task_send_sent_event": True}
        )
        with app:
            yield app

    def _online(self) -> bool:
        return bool(
            self._brain.agent(self._agent.project, self._agent.agent_id)["state"] == "online"
        )

    def _await(
        self, *task_ids: str, states: tuple[str, ...] = ("success", "failure", "revoked")
    ) -> None:
        """Wait until the brain has these tasks in one of ``states``, or until the time-out.

        The time-out is no error, because an agent may not report such a state.
        """
        deadline = time.monotonic() + _TASK_TIMEOUT
        while time.monotonic() < deadline:
            rows = [self._brain.task(self._agent.project, "celery", each) for each in task_ids]
            if all(row and row["state"] in states for row in rows):
                return
            time.sleep(0.3)

    def _command(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            issued = self._brain.issue(
                self._agent.project, route, agent_id=self._agent.agent_id, **body
            )
            row = self._brain.wait_command(self._agent.project, issued["id"])
        except BrainRefusedError as error:
            return {"status": f"refused by the brain with {error.status}"}
        return {key: _plain(row[key]) for key in ("status", "result", "error")}

    def _tasks(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for task_id in [*(each[0] for each in TASKS), "parent-child", "waits"]:
            row = self._brain.task(self._agent.project, "celery", task_id) or {}
            found |= {f"task {task_id}: {key}": row.get(key) for key in _TASK}
            found |= {f"task {task_id}: {key}": row.get(key) is not None for key in _PRESENCE}
            events = self._brain.events(self._agent.project, "celery", task_id)
            found[f"task {task_id}: events"] = dict(
                sorted(Counter(event["kind"] for event in events).items())
            )
        return found

    def _others(self) -> dict[str, Any]:
        """Return the tasks that commands started, whose ids are not known beforehand."""
        known = {each[0] for each in TASKS} | {"parent-child", "waits"}
        rows = [
            row for row in self._brain.tasks(self._agent.project) if row["task_id"] not in known
        ]
        return {
            "other tasks": dict(
                sorted(Counter(f"{row['name']} {row['state']}" for row in rows).items())
            )
        }

    def _workers(self) -> dict[str, Any]:
        rows = self._brain.workers(self._agent.project)
        queues = self._brain.queues(self._agent.project)
        return {
            "workers": sorted(f"{row['engine']} {row['name']} {row['state']}" for row in rows),
            "queues": sorted(row["name"] for row in queues),
        }

    def _agents(self) -> dict[str, Any]:
        row = self._brain.agent(self._agent.project, self._agent.agent_id)
        found = {f"agent: {key}": row.get(key) for key in _AGENT}
        processes = self._brain.agent_workers(self._agent.project)
        found["agent: processes"] = sorted(f"{each['role']} {each['state']}" for each in processes)
        return found


def commands_by_path(commands: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the fields of all commands by path."""
    return {
        f"command {label}: {key}": value
        for label, row in commands.items()
        for key, value in row.items()
    }


def _compare(pool: str, found: dict[str, dict[str, Any]]) -> list[Difference]:
    existing, ours = (found[variant] for variant in VARIANTS)
    paths = dict.fromkeys([*existing, *ours])
    pairs = [(path, existing.get(path), ours.get(path)) for path in paths]
    return [Difference(pool, *pair) for pair in pairs if pair[1] != pair[2]]


def _plain(value: object) -> object:
    """Return ``value`` with generated ids replaced."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return _UUID.sub("<id>", value) if isinstance(value, str) else value
