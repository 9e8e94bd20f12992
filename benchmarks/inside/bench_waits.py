"""The application of ``bench_app`` with a task that waits until the harness ends it."""

import threading
import time

import bench_steps
from bench_app import app, signals
from bench_meter import HOME

#: Seconds between two checks whether the tasks are to end.
POLL_INTERVAL = 0.5
#: Number of calls from the task to the wait.
DEPTH = 11

_ended = threading.Event()


@app.task(name="bench.waits", ignore_result=True)
def waits() -> None:
    """Wait in a function that is called by :data:`DEPTH` others."""
    _call(DEPTH)


def _call(depth: int) -> None:
    if depth:
        _call(depth - 1)
    else:
        _ended.wait()


def _await_end() -> None:
    while not (HOME / "end").exists():
        time.sleep(POLL_INTERVAL)
    _ended.set()


def start(**_signal) -> None:
    """Start the thread that waits for the harness, and the recorder of steps."""
    threading.Thread(target=_await_end, daemon=True).start()
    bench_steps.watch(HOME)


signals.worker_ready.connect(start, weak=False)
