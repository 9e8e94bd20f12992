"""The worker's Celery application, the same for every variant.

The module also runs in other virtual environments. Therefore it imports only the standard library,
Celery, and the variant's agent or library.
"""

import os
import time

import bench_meter
from celery import Celery, signals

VARIANT = os.environ["BENCH_VARIANT"]
#: What observes the worker: ``agent``, a library of ``bench_libraries``, or nothing if empty.
SET_UP = os.environ["BENCH_SET_UP"]

if os.environ.get("BENCH_CORE"):
    os.sched_setaffinity(0, {int(os.environ["BENCH_CORE"])})

app = Celery("bench")
app.conf.update(
    broker_url=os.environ["BENCH_BROKER"],
    task_default_queue="bench",
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=True,
)


@app.task(name="bench.nap", ignore_result=True)
def nap(**_arguments: object) -> None:
    """Sleep 10 ms, as a task that waits for an answer does."""
    time.sleep(0.01)
    bench_meter.ended()


@app.task(name="bench.fails", ignore_result=True)
def fails(**_arguments: object) -> None:
    """Raise an exception."""
    bench_meter.ended()
    raise ValueError("a failure of the benchmark")


signals.worker_ready.connect(bench_meter.start_ticker, weak=False)
signals.worker_ready.connect(bench_meter.ready, weak=False)

if os.environ.get("BENCH_ATTRIBUTE") == "1":
    import bench_attribution

    signals.worker_ready.connect(bench_attribution.begin, weak=False)
    if VARIANT == "ours":
        bench_attribution.install_parts()

if SET_UP == "agent":
    from z4j_celery import CeleryEngineAdapter

    from z4j_bare import install_agent

    install_agent(engines=[CeleryEngineAdapter(celery_app=app)])
elif SET_UP:
    import bench_libraries

    bench_libraries.set_up(SET_UP)
