"""Events that are lost on their way to the store are counted, with one warning of each kind."""

import sys
import threading
from types import SimpleNamespace

import pytest
from celery import signals
from z4j_celery import CeleryEngineAdapter

from tests.support.celery_fakes import memory_app, receive
from z4j_bare.engines.celery.capture import CeleryCapture
from z4j_bare.events.losses import LossLog
from z4j_bare.events.ring import Ring
from z4j_bare.events.snapshot import snapshot


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


class Unreadable:
    """A request that fails when its arguments are read."""

    id, name = "t1", "shop.add"
    parent_id = root_id = None
    delivery_info = {"routing_key": "q"}  # noqa: RUF012
    request_dict = {}  # noqa: RUF012

    def __init__(self, task):
        self.task = task

    @property
    def args(self):
        raise ValueError("hunter2")


def test_uncaptured_events_are_counted_and_named(backend, caplog):
    """Events that a handler cannot capture are counted; the first of a kind is logged, with the
    task's name and without its arguments.
    """
    ring = Ring(10, 10, backend.event())
    with memory_app() as app:
        task = app.task(lambda_free_add, shared=False, name="shop.add")
        capture = CeleryCapture(
            CeleryEngineAdapter(celery_app=app), ring.put, "w@h", on_loss=ring.count_uncaptured
        )
        capture.connect()
        try:
            receive(app, "shop.add")
            for _ in range(3):
                signals.task_received.send(sender=None, request=Unreadable(app.tasks[task.name]))
            signals.task_revoked.send(sender=app.tasks["shop.add"], request=None)
        finally:
            capture.disconnect()
    assert (ring.produced, ring.uncaptured, ring.lost, len(ring)) == (1, 4, 0, 1)
    logged = warnings(caplog)
    assert len(logged) == 2
    assert all("shop.add" in text for text in logged)
    assert "hunter2" not in caplog.text


def lambda_free_add():
    """A task."""


def test_interrupts_of_the_host_are_not_losses(backend):
    """An exception by which the host ends a task passes the handler and counts nothing."""
    from billiard.exceptions import SoftTimeLimitExceeded

    ring = Ring(10, 10, backend.event())
    with memory_app() as app:
        capture = CeleryCapture(
            CeleryEngineAdapter(celery_app=app), ring.put, "w@h", on_loss=ring.count_uncaptured
        )

        def interrupt(_record):
            raise SoftTimeLimitExceeded

        capture._put = interrupt
        request = SimpleNamespace(id="t", name="n")
        with pytest.raises(SoftTimeLimitExceeded):
            capture._on_unknown(name="shop.gone", id=request.id)
    assert (ring.produced, ring.uncaptured) == (0, 0)


def test_loss_log_reports_each_kind_once(caplog):
    """The same error in the same step is logged once, another error or step again."""
    log = LossLog()
    for error in (ValueError("a"), ValueError("b"), TypeError("c")):
        log.report("encoding", "shop.add", error)
    log.report("capturing", "shop.add", ValueError("a"))
    assert len(warnings(caplog)) == 3


def test_container_changed_by_thread_is_captured(mode):
    """A snapshot of a dictionary and of a set that another thread changes does not fail."""
    if mode != "threads":
        pytest.skip("a greenlet that does not wait is never interrupted")
    changing, members, stop = {}, set(), threading.Event()

    def change():
        number = 0
        while not stop.is_set():
            number += 1
            changing[number % 97] = number
            changing.pop((number * 7) % 97, None)
            members.add(number % 89)
            members.discard((number * 5) % 89)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            assert isinstance(snapshot({"kwargs": changing}), dict)
            assert isinstance(snapshot([members]), list)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
