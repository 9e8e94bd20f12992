"""Micro costs: capture, encode, store, sign; ``record_event`` beside the existing agent's.

Microseconds of wall time per call, p50 and p99, one line per piece.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from benchmarks.environments import existing_python
from benchmarks.figures import costs_of, quantile
from benchmarks.peers import progress
from benchmarks.prefork_costs import prefork_costs
from benchmarks.report import circumstances, save, table
from z4j_bare.demo.process import HarnessError
from z4j_bare.demo.worker import worker_environment

FIVE = {"user_id": 40_001, "order": "A-000123", "amount": 1.23, "currency": "EUR", "notify": True}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "five": FIVE,
    "1k": {"body": "lorem ip" * 128},
    "8k": {"body": "lorem ip" * 1024},
}
ROWS = 256  # maximum number of events in one flush

_SCRIPT = Path(__file__).with_name("inside") / "bench_record_event.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument(
        "--calls", type=int, default=5000, help="calls per piece (default: %(default)s)"
    )
    parser.add_argument("--no-existing", action="store_true", help="leave the existing agent out")


def run(args: argparse.Namespace) -> None:
    """Measure every piece; print and save the table."""
    before = circumstances()
    figures: dict[str, list[float]] = {
        "record_event (ours)": record_event(sys.executable, args.calls)
    }
    if not args.no_existing:
        figures["record_event (existing)"] = record_event(existing_python(), args.calls)
    for name, arguments in ARGUMENTS.items():
        figures |= _capture(name, arguments, args.calls)
    figures |= _open_runs(args.calls)
    figures |= _prefork(args.calls)
    figures |= _store(args.calls)
    figures |= _wire(args.calls)
    rows = [
        (name, *(f"{quantile(costs, share):.2f}" for share in (0.5, 0.99)))
        for name, costs in figures.items()
    ]
    print(table(("piece", "p50 us", "p99 us"), rows))
    shares = (0.0, 0.5, 0.9, 0.99, 1.0)
    quantiles = {
        name: {str(share): quantile(costs, share) for share in shares}
        for name, costs in figures.items()
    }
    print(f"saved {save('hot', {**before, 'calls': args.calls, 'microseconds': quantiles})}")


def record_event(python: str, calls: int) -> list[float]:
    """Return the sorted costs of ``record_event`` under an interpreter of either agent."""
    progress(f"record_event under {python}")
    command, environment = [python, str(_SCRIPT), str(calls)], worker_environment({}, python)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    if done.returncode:
        raise HarnessError(f"{_SCRIPT.name} failed: {done.stderr.strip()[-500:]}")
    costs: list[float] = json.loads(done.stdout.splitlines()[-1])
    return costs


def _capture(name: str, arguments: dict[str, Any], calls: int) -> dict[str, list[float]]:
    """Measure the three signals of a task, the snapshot alone, and the encoder."""
    from celery import signals

    from z4j_bare.events.snapshot import snapshot

    progress(f"capture, arguments: {name}")
    with _captured(calls) as (task, ring):
        requests = [_request(task, f"task-{number}", arguments) for number in range(calls)]
        found = {
            "task_received": costs_of(
                lambda i: signals.task_received.send(sender=None, request=requests[i]), calls
            ),
            "task_prerun": costs_of(lambda i: _prerun(task, requests[i]), calls),
            "task_postrun": costs_of(lambda i: _postrun(task, requests[i]), calls),
            "snapshot": costs_of(lambda _: snapshot(arguments), calls),
        }
        items = ring.take(3 * calls)
        for place, event in enumerate(("received", "started", "succeeded")):
            batch = items[place * calls : (place + 1) * calls]
            found[f"encode {event}"] = costs_of(lambda i, batch=batch: batch[i][0](batch[i]), calls)  # type: ignore[misc]
    if name != "none":  # omit the pieces that do not depend on the arguments
        found = {
            piece: costs
            for piece, costs in found.items()
            if piece.endswith(("received", "snapshot"))
        }
    return {f"{piece}, {name}": costs for piece, costs in found.items()}


@contextmanager
def _captured(calls: int) -> Iterator[tuple[Any, Any]]:
    from celery import Celery
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare.concurrency.threads import ThreadEvent
    from z4j_bare.engines.celery.capture import CeleryCapture
    from z4j_bare.events.ring import Ring

    app = Celery("bench", broker="memory://")

    @app.task(name="bench.nap")  # type: ignore[untyped-decorator]
    def nap(**_arguments: object) -> None:
        """Do nothing; it is never run."""

    ring = Ring(4 * calls, 4 * calls, ThreadEvent())
    capture = CeleryCapture(CeleryEngineAdapter(celery_app=app), ring.put, "worker@bench")
    capture.connect()
    try:
        yield app.tasks[nap.name], ring
    finally:
        capture.disconnect()


def _prefork(calls: int) -> dict[str, list[float]]:
    """Measure the cost of a task in a child of a prefork worker and in the parent."""
    from celery import Celery

    progress("prefork")
    app = Celery("bench", broker="memory://")

    @app.task(name="bench.nap")  # type: ignore[untyped-decorator]
    def nap(**_arguments: object) -> None:
        """Do nothing; it is never run."""

    return prefork_costs(app, app.tasks[nap.name], calls)


def _open_runs(calls: int) -> dict[str, list[float]]:
    """Measure the cost of keeping an open run: its start, its end, and its share of a flush."""
    from z4j_bare.buffer.open_runs import OpenRuns
    from z4j_bare.interfaces import RUN_SUCCEEDED

    progress("open runs")
    with _captured(1) as (task, ring), tempfile.TemporaryDirectory(prefix="z4j-bench-") as home:
        Path(home).chmod(0o700)
        runs = OpenRuns(ring)
        runs.enable()
        runs.attach(Path(home) / "z4j-green-bench.sqlite")
        number = runs.describe("celery", {"task_name": task.name})
        ids = [str(uuid4()) for _ in range(ROWS)]

        def round_of(round_number: int) -> None:
            for task_id in ids:
                slot = runs.start(number, task_id, 1.5, 0)
                runs.end(slot, RUN_SUCCEEDED, 2.5)
            ring.produced = round_number
            runs.stored(round_number, 3.5)

        found = costs_of(round_of, max(20, calls // 25), ROWS)
        runs.close()
    return {"open run, start to stored": found}


def _request(task: Any, task_id: str, arguments: dict[str, Any]) -> Any:
    from celery.utils.saferepr import saferepr

    route = {"routing_key": "bench"}
    return SimpleNamespace(
        id=task_id,
        task=task,
        args=[],
        kwargs=dict(arguments),
        parent_id=None,
        root_id=task_id,
        delivery_info=route,
        request_dict={"retries": 0, "replaced_task_nesting": 0},
        argsrepr="()",
        kwargsrepr=saferepr(arguments, 1024),
    )


def _prerun(task: Any, request: Any) -> None:
    from celery import signals

    signals.task_prerun.send(
        sender=task, task_id=request.id, task=task, args=(), kwargs=request.kwargs
    )


def _postrun(task: Any, request: Any) -> None:
    from celery import signals

    ended = {"retval": None, "state": "SUCCESS"}
    signals.task_postrun.send(
        sender=task, task_id=request.id, task=task, args=(), kwargs=request.kwargs, **ended
    )


def _store(calls: int) -> dict[str, list[float]]:
    """Measure the cost per row when a full batch is appended, drained and confirmed."""
    from z4j_bare.buffer.rows import EVENT
    from z4j_bare.buffer.store import BufferStore

    progress("store")
    row = (EVENT, "", b"x" * 300)
    rounds = max(20, calls // ROWS)
    with tempfile.TemporaryDirectory(prefix="z4j-bench-") as home:
        Path(home).chmod(0o700)
        store = BufferStore(Path(home) / "bench.sqlite")
        try:
            found = {
                "store append, per row": costs_of(
                    lambda _: store.append([row] * ROWS), rounds, ROWS
                )
            }
            found["store append of 12, per row"] = costs_of(
                lambda _: store.append([row] * 12), rounds, 12
            )
            limit = 1 << 30
            drains = costs_of(lambda i: store.drain(i * ROWS, ROWS, limit, (EVENT,)), rounds, ROWS)
            found["store drain, per row"] = drains
            ids = [range(i * ROWS + 1, (i + 1) * ROWS + 1) for i in range(rounds)]
            found["store confirm, per row"] = costs_of(
                lambda i: store.confirm(ids[i]), rounds, ROWS
            )
        finally:
            store.close()
    return found


def _wire(calls: int) -> dict[str, list[float]]:
    """Measure the cost per event when a full frame is signed, and when it is masked."""
    from z4j_bare.transport.websocket import BinaryFrame
    from z4j_bare.wire.frames import event_batch
    from z4j_bare.wire.session import HelloAck, Session

    progress("wire")
    session = Session(HelloAck("agent", "project", "session"), bytes(32))
    events = [b"x" * 300] * 420
    frame = session.sign("event_batch", "ev_0", event_batch(events), 0.0)
    rounds = max(20, calls // len(events))
    return {
        "sign, per event": costs_of(
            lambda _: session.sign("event_batch", "ev_0", event_batch(events), time.time()),
            rounds,
            len(events),
        ),
        "mask, per event": costs_of(lambda _: BinaryFrame(frame).format(), rounds, len(events)),
    }
