"""The event source of RQ. The hooks wrap methods that run while the worker is busy.

z4j_rq's own hook wraps ``execute_job``. That hook is not installed, because it can prevent a stop.
On SIGTERM or SIGINT, an idle RQ worker raises ``StopRequested``, an ordinary ``Exception``.
The worker becomes idle before ``execute_job`` returns, so the hook can catch this exception.
If the hook catches the exception, the worker does not stop, and a successful job is reported as
failed. In a ``SimpleWorker``, which overrides ``execute_job``, z4j_rq's hook never runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency import fork
from z4j_bare.engines.engine import Engine, adapter_version
from z4j_bare.events.source import EventSource
from z4j_bare.safety import safe_boundary

if TYPE_CHECKING:
    from rq.job import Job
    from rq.worker import BaseWorker
    from z4j_core.models import Event
    from z4j_core.protocols import QueueEngineAdapter

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.ring import Ring
    from z4j_bare.settings import Settings

Method = Callable[..., Any]

#: First version of z4j-rq that retries a job without unpickling it.
SAFE_RETRY = (1, 6, 7)


class RqEngine(Engine):
    """Describes RQ. The events come from hooks in RQ's worker classes."""

    kind = "rq"

    def make_source(
        self,
        ring: Ring,
        settings: Settings,
        backend: BaseConcurrency,
        consumer: object,  # noqa: ARG002 - only for Celery
    ) -> RqSource:
        """Return a source that hooks into RQ's workers."""
        return RqSource(self.adapter, ring, settings, backend)

    def retry_problem(self) -> str:
        """Return why the adapter cannot retry a job safely; empty if it can.

        Versions before 1.6.7 unpickle the job.
        Unpickling can run foreign code, because the pickle may come from anyone who can write to
        Redis. If the version is unknown, the signature of ``retry_task`` decides.
        """
        distribution, number = adapter_version(self.adapter)
        if number:
            unsafe = _release(number) < SAFE_RETRY
        else:
            method = getattr(self.adapter, "retry_task", None)
            unsafe = method is not None and not _accepts(method, "task_name")
        if not unsafe:
            return ""
        return (
            f"{distribution or 'the adapter'} {number or 'of an unknown version'} unpickles a job "
            "to retry it, which can run foreign code: upgrade z4j-rq to 1.6.7 or later"
        )


def _release(number: str) -> tuple[int, ...]:
    """Return the release numbers of a version: ``(1, 6, 7)`` for ``1.6.7rc1``.

    The result is empty if the version does not start with a number. Such a version counts as too
    old.
    """
    found = re.match(r"v?(\d{1,9}(?:\.\d{1,9})*)", number.strip())
    return tuple(map(int, found.group(1).split("."))) if found else ()


def _accepts(method: Method, name: str) -> bool:
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


class RqSource(EventSource):
    """Captures RQ's events, which z4j_rq's callbacks create.

    Users may also attach these callbacks to a job themselves.
    """

    uses_adapter_events = False

    def __init__(
        self, adapter: QueueEngineAdapter, ring: Ring, settings: Settings, backend: BaseConcurrency
    ) -> None:
        super().__init__(adapter, ring, settings, backend)
        self._redaction: object = adapter.redaction  # type: ignore[attr-defined]
        self._epoch = fork.epoch()
        self._hooks: list[tuple[type, str, Method | None, Method]] = []

    def connect(self) -> None:
        """Receive the callbacks' events, and install the hooks. Idempotent."""
        from z4j_rq.events import callbacks

        super().connect()
        callbacks.install(sink=self._record_in_parent, redaction=self._redaction)
        if self._hooks:
            return
        for owner, name, outcome in _hook_points():
            hook = report_job(getattr(owner, name), outcome)
            self._hooks.append((owner, name, vars(owner).get(name), hook))
            setattr(owner, name, hook)

    def disconnect(self) -> None:
        """Remove the hooks. A hook that other code has wrapped stays, but records nothing."""
        from z4j_rq.events import callbacks

        while self._hooks:
            owner, name, original, hook = self._hooks.pop()
            if vars(owner).get(name) is hook:
                delattr(owner, name)
                if original is not None:  # else the method is inherited
                    setattr(owner, name, original)
        callbacks.uninstall()
        super().disconnect()

    def _record_in_parent(self, event: Event) -> None:
        # In a forked work horse, nothing reads the copy of the ring.
        if fork.epoch() == self._epoch:
            self.record(event)


def report_job(method: Method, outcome: Callable[[Job], str]) -> Method:
    """Wrap a worker's ``method(job, queue, ...)`` to report the job's start and end.

    :param outcome: returns the job's status after the call.
    """
    from z4j_rq.events import capture_failure, capture_started, capture_success

    reports = {"finished": capture_success, "failed": capture_failure, "stopped": capture_failure}

    @safe_boundary
    def report_end(job: Job) -> None:
        report = reports.get(outcome(job))  # ``None`` if the job will be retried
        if report is not None:
            report(job)

    @wraps(method)
    def perform_and_report(worker: BaseWorker, job: Job, *args: Any, **kwargs: Any) -> Any:
        job.worker_name = worker.name  # RQ sets this attribute only later
        capture_started(job)
        try:
            returned = method(worker, job, *args, **kwargs)
        except BaseException:
            capture_failure(job)
            raise
        report_end(job)
        return returned

    return perform_and_report


def _hook_points() -> Iterator[tuple[type, str, Callable[[Job], str]]]:
    """Yield each worker class, its method that runs a job, and a function for the job's status."""
    try:
        from rq.worker import SimpleWorker, Worker
    except ImportError:  # a process that runs no workers may have no rq installed
        return
    # ``monitor_work_horse`` runs in the parent process while the job runs in a child process.
    yield Worker, "monitor_work_horse", _status_in_redis
    yield SimpleWorker, "perform_job", _status_in_memory


def _status_in_redis(job: Job) -> str:
    """Return the status that the work horse wrote to Redis.

    RQ deletes a finished job whose result is not kept. Therefore a job that is no longer in Redis
    has finished.
    """
    from rq.exceptions import InvalidJobOperation

    try:
        return job.get_status() or "finished"
    except InvalidJobOperation:
        return "finished"


def _status_in_memory(job: Job) -> str:
    """Return the status that the worker has set.

    RQ 2 sets no final status for a job whose result is not stored.
    """
    status: str = job.get_status(refresh=False)
    return "finished" if status == "started" else status
