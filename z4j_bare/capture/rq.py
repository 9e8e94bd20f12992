"""RQ's ``SimpleWorker``, which the adapter passes by.

z4j_rq hooks the class that defines ``execute_job`` for ``Worker``; ``SimpleWorker`` has one of its own (RQ 3.0), whose jobs
would run unheard. What is told of them is the adapter's business all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from z4j_bare.capture.sources import Source
from z4j_bare.safety import safe_boundary

_METHOD = "execute_job"


class RqSource(Source):
    """RQ's events, those of ``SimpleWorker`` included."""

    _hooked: tuple[type, Callable[..., Any]] | None = None

    def connect(self) -> None:
        """Put the hook on, unless somebody else has one there."""
        owner = _simple_worker()
        if owner is None:
            return
        original = getattr(owner, _METHOD)
        if original.__module__.partition(".")[0] == "rq":
            self._hooked = owner, original
            setattr(owner, _METHOD, told(original))

    def disconnect(self) -> None:
        """Take the hook off."""
        hooked, self._hooked = self._hooked, None
        if hooked is not None:
            owner, original = hooked
            setattr(owner, _METHOD, original)
        super().disconnect()


def told(execute_job: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a worker's ``execute_job(job, queue)``: the adapter hears of the start and of the outcome."""
    from z4j_rq.events import capture_failure, capture_started

    @wraps(execute_job)
    def execute_and_tell(worker: Any, job: Any, queue: Any) -> Any:
        job.worker_name = worker.name  # RQ itself sets it later than the start is told
        capture_started(job)
        try:
            outcome = execute_job(worker, job, queue)
        except BaseException:
            capture_failure(job)
            raise
        _tell_outcome(job)
        return outcome

    return execute_and_tell


@safe_boundary
def _tell_outcome(job: Any) -> None:
    """Tell how a job ended, which RQ has written to Redis by then; one that waits for another attempt has not."""
    from z4j_rq.events import capture_failure, capture_success

    status = job.get_status()
    if status == "finished":
        capture_success(job)
    elif status in ("failed", "stopped"):
        capture_failure(job)


def _simple_worker() -> type | None:
    try:
        from rq.worker import SimpleWorker
    except ImportError:  # a process without a worker can have an engine that needs no rq
        return None
    return SimpleWorker  # type: ignore[no-any-return]
