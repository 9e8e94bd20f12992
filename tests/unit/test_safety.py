"""The boundary between the host and us: what it holds back, what it must let through, and what Celery makes of it."""

import inspect
import logging
from importlib import import_module

import pytest

from z4j_bare import BareFrameworkAdapter, safe_boundary, safe_call
from z4j_bare.safety import safe_log_extra


def fail(error):
    raise error


def test_results_pass():
    """A call that works returns what it returns."""
    assert safe_call(divmod, 7, 2) == (3, 1)
    assert safe_boundary(divmod)(7, 2) == (3, 1)
    assert safe_call(dict, a=1) == {"a": 1}


def test_errors_stay_here(caplog):
    """An ordinary exception is logged with its traceback and becomes None."""
    assert safe_call(fail, ValueError("ours")) is None
    assert safe_boundary(fail)(KeyError("ours")) is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "fail failed with ValueError" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_process_passes(kind):
    """What is meant to end the process or the generator is not an error of ours."""
    with pytest.raises(kind):
        safe_call(fail, kind())
    with pytest.raises(kind):
        safe_boundary(fail)(kind())


def test_greenlet_exit_passes():
    """Killing a greenlet inside a handler of ours kills it."""
    from greenlet import GreenletExit

    with pytest.raises(GreenletExit):
        safe_call(fail, GreenletExit())
    with pytest.raises(GreenletExit):
        safe_boundary(fail)(GreenletExit())


def test_time_outs_of_the_host_pass(mode):
    """A user's gevent or eventlet time-out that fires inside a handler of ours reaches the user."""
    if mode == "eventlet":
        from eventlet import Timeout
    else:
        from gevent import Timeout
    with pytest.raises(Timeout):
        safe_call(fail, Timeout())
    with pytest.raises(Timeout):
        safe_boundary(fail)(Timeout())


ORDERS = ["billiard.exceptions.SoftTimeLimitExceeded", "huey.exceptions.TaskTimeout"]
ORDERS += ["rq.exceptions.StopRequested", "rq.timeouts.BaseTimeoutException"]


def order_of(host):
    """The host's own class, or one of its name where the host is not installed."""
    module, _, name = host.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError:
        return type(name, (Exception,), {"__module__": module})


@pytest.mark.parametrize("host", ORDERS)
def test_orders_of_the_host_pass(host):
    """What a queue raises from its signal handlers reaches it, also as a subclass, although it is an Exception."""
    kind = order_of(host)
    derived = type("Derived", (kind,), {})
    for raised in (kind(), derived()):
        with pytest.raises(kind):
            safe_call(fail, raised)
        with pytest.raises(kind):
            safe_boundary(fail)(raised)


def test_the_wrapper_keeps_its_looks():
    """A wrapped function keeps its name, its docstring and the original."""

    def documented():
        """Say so."""

    wrapped = safe_boundary(documented)
    assert (wrapped.__name__, wrapped.__doc__, wrapped.__wrapped__) == (
        "documented",
        "Say so.",
        documented,
    )


class Receiver:
    def __init__(self):
        self.got = []

    @safe_boundary
    def on_task(self, sender=None, **kwargs):
        self.got.append((sender, kwargs))

    @safe_boundary
    def on_trouble(self, **_kwargs):
        raise ValueError("a bug of ours")


def test_celery_takes_a_wrapped_method(caplog):
    """Celery's Signal.connect, which reads code flags, accepts a wrapped method; the task goes on when it fails."""
    from celery.utils.dispatch import Signal

    assert safe_boundary(fail).__code__.co_flags & inspect.CO_VARKEYWORDS
    signal, receiver = Signal(name="task", providing_args={"task_id"}), Receiver()
    signal.connect(receiver.on_task, weak=False)
    signal.connect(receiver.on_trouble, weak=False)
    assert [outcome for _, outcome in signal.send("sender", task_id="t-1")] == [None, None]
    assert receiver.got[0][0] == "sender"
    assert receiver.got[0][1]["task_id"] == "t-1"
    assert "on_trouble failed with ValueError" in caplog.text


def test_broken_logging_is_survived(monkeypatch, capsys):
    """When logging itself fails, one line without the message, which may hold a secret, goes to stderr."""
    monkeypatch.setattr(
        logging.getLogger("z4j.runtime.safety"),
        "error",
        lambda *_args, **_options: fail(OSError("full")),
    )
    assert safe_call(fail, ValueError("a secret")) is None
    said = capsys.readouterr().err
    assert "fail failed with ValueError" in said
    assert "secret" not in said


def test_log_extra():
    """Keys that logging reserves are renamed, so that a user's own cannot break a log call."""
    extra = safe_log_extra({"message": 1, "args": 2, "name": 3, "asctime": 4, "mine": 5})
    assert extra == {
        "user_message": 1,
        "user_args": 2,
        "user_name": 3,
        "user_asctime": 4,
        "mine": 5,
    }
    logging.getLogger("z4j.test").warning("x", extra=extra)


def test_the_plain_framework():
    """The adapter for no framework hands its configuration through, knows nobody, and runs hooks in order."""
    config, ran = object(), []
    bare = BareFrameworkAdapter(config)
    bare.on_startup(lambda: ran.append("a"))
    bare.on_startup(lambda: ran.append("b"))
    bare.on_shutdown(lambda: ran.append("c"))
    bare.register_admin_view(object())
    assert bare.discover_config() is config
    assert bare.discovery_hints().framework_name == bare.name == "bare"
    assert (bare.current_context(), bare.current_user()) == (None, None)
    bare.fire_startup()
    bare.fire_shutdown()
    assert ran == ["a", "b", "c"]
    bare.on_shutdown(lambda: fail(ValueError("the host's own")))
    with pytest.raises(ValueError, match="own"):
        bare.fire_shutdown()
