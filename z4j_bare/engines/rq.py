"""RQ's events, told while its worker is busy.

RQ's handler of SIGTERM and SIGINT sets a flag while the worker works, and raises ``StopRequested``, an ordinary exception,
at any other moment. z4j_rq's own hook surrounds ``execute_job``, at whose end the worker is idle already: raised there, the
request to stop passes for an error of the hook's, which swallows it and tells a job that went well as failed. It also
passes by ``SimpleWorker``, which has an ``execute_job`` of its own. So the hooks here are further inside, and the adapter's
stays off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency import fork
from z4j_bare.engines.engine import Engine
from z4j_bare.events.source import EventSource
from z4j_bare.safety import safe_boundary

if TYPE_CHECKING:
    from z4j_core.models import Event

    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.events.ring import Ring
    from z4j_bare.settings import Settings

Method = Callable[..., Any]


class RqEngine(Engine):
    """Describes RQ: events by hooks in its worker classes."""

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


class RqSource(EventSource):
    """RQ's events, made by the adapter's callbacks: those that users attach to a job work as well."""

    uses_adapter_events = False

    def __init__(self, engine: Any, *args: Any) -> None:
        super().__init__(engine, *args)
        self._redaction = engine.redaction
        self._epoch = fork.epoch()
        self._hooks: list[tuple[type, str, Method | None, Method]] = []

    def connect(self) -> None:
        """Take the callbacks' events, and put the hooks on. Idempotent."""
        from z4j_rq.events import callbacks

        super().connect()
        callbacks.install(sink=self._take, redaction=self._redaction)
        if self._hooks:
            return
        for owner, name, outcome in _places():
            hook = told(getattr(owner, name), outcome)
            self._hooks.append((owner, name, vars(owner).get(name), hook))
            setattr(owner, name, hook)

    def disconnect(self) -> None:
        """Take the hooks off; one that somebody else has wrapped stays, and tells nobody."""
        from z4j_rq.events import callbacks

        while self._hooks:
            owner, name, own, hook = self._hooks.pop()
            if vars(owner).get(name) is hook:
                delattr(owner, name)
                if own is not None:  # else inherited
                    setattr(owner, name, own)
        callbacks.uninstall()
        super().disconnect()

    def _take(self, event: Event) -> None:
        if (
            fork.epoch() == self._epoch
        ):  # nobody would ever read what a forked work horse puts into its copy of the ring
            self.record(event)


def told(method: Method, outcome: Callable[[Any], str]) -> Method:
    """Wrap a worker's ``method(job, queue, ...)``: the adapter hears of the start, and of ``outcome(job)`` afterwards."""
    from z4j_rq.events import capture_failure, capture_started, capture_success

    ends = {"finished": capture_success, "failed": capture_failure, "stopped": capture_failure}

    @safe_boundary
    def tell_end(job: Any) -> None:
        end = ends.get(outcome(job))  # a job that waits for another attempt has none
        if end is not None:
            end(job)

    @wraps(method)
    def perform_and_tell(worker: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        job.worker_name = worker.name  # RQ itself sets it later than the start is told
        capture_started(job)
        try:
            returned = method(worker, job, *args, **kwargs)
        except BaseException:
            capture_failure(job)
            raise
        tell_end(job)
        return returned

    return perform_and_tell


def _places() -> Iterator[tuple[type, str, Callable[[Any], str]]]:
    """Yield where each worker of RQ is busy with one job, and how to read there how it ended."""
    try:
        from rq.worker import SimpleWorker, Worker
    except ImportError:  # a process without a worker can have an engine that needs no rq
        return
    yield (
        Worker,
        "monitor_work_horse",
        _written,
    )  # the parent's part; the job itself runs in a child
    yield SimpleWorker, "perform_job", _known


def _written(job: Any) -> str:
    """Return the status that the work horse has written to Redis; of a job that is gone from there, RQ keeps no result."""
    from rq.exceptions import InvalidJobOperation

    try:
        return job.get_status() or "finished"
    except InvalidJobOperation:
        return "finished"


def _known(job: Any) -> str:
    """Return the status that the worker has just given the job; RQ 2 gives none where it keeps no result."""
    status: str = job.get_status(refresh=False)
    return "finished" if status == "started" else status
