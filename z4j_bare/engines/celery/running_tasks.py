"""Lists the tasks that a Celery worker runs, and the position of each task in the code.

The agent imports this module at the first request for the list.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter, time
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from z4j_bare.concurrency.stacks import (
    HeapScan,
    Position,
    innermost_user_code,
    is_internal,
    is_runtime,
    is_tracer,
    read_stack,
    text_of,
)
from z4j_bare.engines.celery.task_state import TaskState, TaskStates

if TYPE_CHECKING:
    from celery import Celery

    from z4j_bare.concurrency import BaseConcurrency

#: Maximum number of spawned greenlets that are listed for one task.
MAX_CHILDREN = 50


class TaskQuery(NamedTuple):
    """A client's request for the list.

    :param task: id of the only task to list; empty for all tasks.
    :param stack: whether to return whole stacks.
    :param all_frames: whether the stacks include the frames of Celery and of the hub.
    """

    task: str = ""
    stack: bool = False
    all_frames: bool = False


class _Run(NamedTuple):
    task_id: str
    name: str
    queue: str | None
    age: float
    context: object
    pid: int


class RunningTasks:
    """The tasks that run in a worker.

    :param task_states: the states of the worker's tasks.
    :param worker: the worker's name in the brain.
    :param in_process: whether the tasks run in this process. A prefork pool runs its tasks in
        child processes, whose stacks this process cannot read.
    """

    def __init__(
        self,
        app: Celery,
        task_states: TaskStates,
        worker: str | None,
        backend: BaseConcurrency,
        *,
        in_process: bool,
    ) -> None:
        self._app = app
        self._task_states = task_states
        self._worker = worker
        self._backend = backend
        self._in_process = in_process

    def iter_rows(
        self, query: TaskQuery, checkpoint: Callable[[], object]
    ) -> Iterator[dict[str, Any]]:
        """Iterate over the running tasks as plain JSON types, longest run first.

        ``checkpoint`` is called between two tasks, when no frame is held.
        """
        runs = sorted(self._runs(query.task), key=lambda run: -run.age)
        if not self._in_process:
            for run in runs:
                checkpoint()
                yield self._row(run)
            return
        scan = HeapScan()
        if runs and ("gevent" in sys.modules or "asyncio" in sys.modules):
            self._backend.offload(scan.run)
        # An eager task inside another task has the context of the outer task, and started later.
        nested: dict[int, list[_Run]] = {}
        for run in runs:
            nested.setdefault(_key(run.context), []).append(run)
        for run in runs:
            outer, *eager = nested[_key(run.context)]
            if run is not outer and run.context is not None:
                continue
            checkpoint()
            row = {**self._row(run), **self._place(run, query, scan)}
            if eager and run.context is not None:
                row["eager"] = [self._row(each) for each in eager]
            yield row

    def _runs(self, task_id: str) -> Iterator[_Run]:
        """Iterate over the runs that have started and not ended."""
        from celery.worker import state

        now, listed = perf_counter(), set()
        for found, last in list(self._task_states.items()) if self._in_process else ():
            task_state: TaskState | None = last
            while task_state is not None:
                if task_state.started_at and task_id in ("", found):
                    listed.add(found)
                    yield _Run(
                        found,
                        task_state.task_type.name,
                        task_state.queue,
                        now - task_state.started_at,
                        task_state.context,
                        os.getpid(),
                    )
                task_state = task_state.attempt.previous if task_state.attempt else None
        # Tasks that ``@z4j_meta`` excludes from the events have no state. All runs of a prefork
        # pool are read from Celery's requests, which contain the children's pids.
        for request in list(state.active_requests):
            found = str(request.id)
            if found in listed or task_id not in ("", found) or not request.time_start:
                continue
            known = self._task_states.get(found)
            if self._in_process and known is not None:
                continue  # the run has not begun, or has just ended
            queue = known.queue if known is not None else None
            age = max(0.0, time() - request.time_start)
            pid = os.getpid() if self._in_process else request.worker_pid or 0
            yield _Run(found, str(request.name), queue, age, None, pid)

    def _row(self, run: _Run) -> dict[str, Any]:
        return {
            "id": run.task_id,
            "name": run.name,
            "worker": self._worker,
            "queue": run.queue,
            "pid": run.pid,
            "age_seconds": round(run.age, 3),
        }

    def _place(self, run: _Run, query: TaskQuery, scan: HeapScan) -> dict[str, Any]:
        """Return where a run is. The hub must not switch, because a switch changes the frames."""
        function = getattr(self._app.tasks.get(run.name), "run", None)
        package = (getattr(function, "__module__", None) or "").partition(".")[0]
        frame_of = self._backend.frame_reader()
        stack = _task_frames(frame_of(run.context), all_frames=query.all_frames)
        coroutines = scan.coroutines(run.context)
        place = describe_place(stack, package, query)
        if coroutines:
            place = describe_place(coroutines[0], package, query)
            if query.stack:
                place["stack"] += [
                    _frame(each) for each in stack if query.all_frames or not is_internal(each)
                ]
        if len(coroutines) > 1:
            place["coroutines"] = [
                describe_place(each, package, query) for each in coroutines[1 : MAX_CHILDREN + 1]
            ]
        if children := self._children(run.context, package, query, scan, frame_of):
            place["greenlets"] = children
        return place

    def _children(
        self,
        context: object,
        package: str,
        query: TaskQuery,
        scan: HeapScan,
        frame_of: Callable[[object], FrameType | None],
    ) -> list[dict[str, Any]]:
        children: list[dict[str, Any]] = []
        for child in scan.children(context):
            if len(children) == MAX_CHILDREN:
                break
            if (frame := frame_of(child)) is not None:
                stack = _task_frames(frame, all_frames=query.all_frames)
                children.append(describe_place(stack, package, query))
        return children


def describe_place(stack: Sequence[Position], package: str, query: TaskQuery) -> dict[str, Any]:
    """Return where a stack is, as plain JSON types.

    ``position`` is ``None`` if the stack has no frame of the user's code.
    """
    index, waiting = innermost_user_code(stack, package)
    position = stack[index] if index >= 0 else None
    place: dict[str, Any] = {
        "position": None if position is None else text_of(position),
        "waiting_in": waiting or None,
    }
    if query.stack:
        place["stack"] = [
            _frame(each) for each in stack if query.all_frames or not is_internal(each)
        ]
    return place


def _task_frames(frame: FrameType | None, *, all_frames: bool) -> list[Position]:
    """Return a stack without the outer frames of Celery and of the hub, innermost first."""
    stack = read_stack(frame)
    tracers = [n for n, each in enumerate(stack) if is_tracer(each)]
    if tracers and not all_frames:
        del stack[tracers[-1] :]
    while stack and not all_frames and is_runtime(stack[-1]):
        stack.pop()
    return stack


def _frame(position: Position) -> Mapping[str, object]:
    return {
        "file": position.file,
        "line": position.line,
        "function": position.function,
        "module": position.module,
        "locals": list(position.names),
    }


def _key(context: object) -> int:
    return context if isinstance(context, int) else id(context)
