"""CPU time of handlers, loops, host and hub inside a worker, by ``time.thread_time``.

This module wraps the agent's methods, so the package contains no code for the measurement. Under
gevent and eventlet a greenlet tracer assigns the time between two switches to the greenlet that
ran. Threads have clocks of their own. The result includes the cost of the measurement itself (1 us
a switch, 0.5 us a call).
"""

import atexit
import gc
import json
import os
import sys
from collections import defaultdict
from functools import wraps
from pathlib import Path
from time import thread_time

totals = defaultdict(lambda: [0, 0.0])
_names = {}

#: Module, class, methods that never yield. They are measured separately inside the calling loop.
PARTS = (
    (
        "z4j_bare.engines.celery.task_encoder",
        "TaskEncoder",
        ("received", "started", "succeeded", "generic"),
    ),
    ("z4j_bare.wire.session", "Session", ("sign", "verify")),
    ("z4j_bare.buffer.store", "BufferStore", ("append", "drain", "confirm", "stats")),
)
HANDLERS = ("_on_received", "_on_prerun", "_on_postrun", "_on_failure", "_on_retry")


def install_parts():
    """Wrap the agent's handlers, loops and parts; call it before the agent is installed."""
    from z4j_bare.engines.celery.capture import CeleryCapture

    for name in HANDLERS:
        setattr(CeleryCapture, name, _timed(getattr(CeleryCapture, name), f"handler {name[4:]}"))
    for module, owner, names in PARTS:
        kind = getattr(__import__(module, fromlist=[owner]), owner)
        for name in names:
            setattr(kind, name, _timed(getattr(kind, name), f"part {owner}.{name.strip('_')}"))
    _wrap_backend()


def begin(**_signal):
    """Start tracing when the worker is ready; the totals are written at process exit."""
    if "gevent" in sys.modules or "eventlet" in sys.modules:
        _trace_greenlets()
    gc.callbacks.append(_collected)
    atexit.register(_dump)


def _collected(phase, info, began=[0.0]):  # noqa: B006 - one collection at a time
    """Add the time of a garbage collection, which also counts for the code that triggered it."""
    if phase == "start":
        began[0] = thread_time()
    else:
        _charge(totals[f"collector {info['generation']}"], began[0])


def _timed(function, name):
    cell = totals[name]

    @wraps(function)
    def measured(*args, **kwargs):
        began = thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _charge(cell, began)

    return measured


def _wrap_backend():
    from z4j_bare.concurrency import base

    run, capture_outcome = base.BaseConcurrency._run, base.capture_outcome

    def timed_run(self, task, function, args):
        began = thread_time()
        if self.name != "threads":
            import greenlet

            _names[greenlet.getcurrent()] = f"loop {task.name}"
        try:
            run(self, task, function, args)
        finally:
            if self.name == "threads":
                _charge(totals[f"loop {task.name}"], began)

    def timed_attempt(function, args):
        inner = args[0] if args and callable(args[0]) else function
        began = thread_time()
        try:
            return capture_outcome(function, args)
        finally:
            _charge(totals[f"offloaded {getattr(inner, '__name__', inner)}"], began)

    base.BaseConcurrency._run, base.capture_outcome = timed_run, timed_attempt


def _trace_greenlets():
    import greenlet

    since = thread_time()

    def switched(_event, ends):
        nonlocal since
        now = thread_time()
        cell = totals[_name(ends[0])]
        cell[0] += 1
        cell[1] += now - since
        since = thread_time()

    greenlet.settrace(switched)


def _name(each):
    found = _names.get(each)
    if found is None:
        kind = type(each).__name__
        module = type(each).__module__
        found = "hub" if kind == "Hub" or "hubs" in module else "host"
        if getattr(each, "name", "") == "bench-ticker":
            found = "ticker"
        if found == "hub":
            _names[each] = found
    return found


def _charge(cell, began):
    cell[0] += 1
    cell[1] += thread_time() - began


def _dump():
    path = Path(os.environ["BENCH_HOME"]) / f"attribution.{os.getpid()}.json"
    path.write_text(json.dumps(totals))
