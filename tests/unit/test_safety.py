"""The boundary that keeps errors of the agent out of the calls of its host."""

import inspect
import logging
from importlib import import_module

import pytest

from z4j_bare import BareFrameworkAdapter, safe_boundary, safe_call
from z4j_bare.safety import safe_log_extra


def fail(error):
    """Raise ``error``."""
    raise error


def test_boundary_returns_result():
    """A call that succeeds returns its result."""
    assert safe_call(divmod, 7, 2) == (3, 1)
    assert safe_boundary(divmod)(7, 2) == (3, 1)
    assert safe_call(dict, a=1) == {"a": 1}


def test_boundary_logs_exception_and_returns_none(caplog):
    """An ordinary exception is logged with its traceback and becomes ``None``."""
    assert safe_call(fail, ValueError("agent")) is None
    assert safe_boundary(fail)(KeyError("agent")) is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "fail failed with ValueError" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_exception_that_ends_process_passes(kind):
    """Exceptions that end the process or a generator are not suppressed."""
    with pytest.raises(kind):
        safe_call(fail, kind())
    with pytest.raises(kind):
        safe_boundary(fail)(kind())


def test_greenlet_exit_passes():
    """A greenlet that is killed inside a handler ends."""
    from greenlet import GreenletExit

    with pytest.raises(GreenletExit):
        safe_call(fail, GreenletExit())
    with pytest.raises(GreenletExit):
        safe_boundary(fail)(GreenletExit())


def test_timeout_of_user_passes(mode):
    """A user's gevent or eventlet timeout that expires inside a handler reaches the user."""
    if mode == "eventlet":
        from eventlet import Timeout
    else:
        from gevent import Timeout
    with pytest.raises(Timeout):
        safe_call(fail, Timeout())
    with pytest.raises(Timeout):
        safe_boundary(fail)(Timeout())


CONTROL_FLOW = ["billiard.exceptions.SoftTimeLimitExceeded", "huey.exceptions.TaskTimeout"]
CONTROL_FLOW += ["rq.exceptions.StopRequested", "rq.timeouts.BaseTimeoutException"]


def exception_class(name):
    """Return the class, or one of the same name if its package is not installed."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError:
        return type(attribute, (Exception,), {"__module__": module})


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_control_flow_exception_passes(name):
    """An exception by which a queue interrupts a task reaches the queue, also as a subclass."""
    kind = exception_class(name)
    derived = type("Derived", (kind,), {})
    for raised in (kind(), derived()):
        with pytest.raises(kind):
            safe_call(fail, raised)
        with pytest.raises(kind):
            safe_boundary(fail)(raised)


def test_wrapper_keeps_metadata():
    """A wrapped function keeps its name, its docstring and the original function."""

    def documented():
        """A docstring."""

    wrapped = safe_boundary(documented)
    assert (wrapped.__name__, wrapped.__doc__, wrapped.__wrapped__) == (
        "documented",
        "A docstring.",
        documented,
    )


class Receiver:
    """Signal handlers, one of which fails."""

    def __init__(self):
        self.received = []

    @safe_boundary
    def on_task(self, sender=None, **kwargs):
        self.received.append((sender, kwargs))

    @safe_boundary
    def on_error(self, **_kwargs):
        raise ValueError("a bug of the agent")


def test_celery_signal_accepts_wrapped_method(caplog):
    """``Signal.connect`` accepts a wrapped method, and the other handlers run when it fails."""
    from celery.utils.dispatch import Signal

    assert safe_boundary(fail).__code__.co_flags & inspect.CO_VARKEYWORDS
    signal, receiver = Signal(name="task", providing_args={"task_id"}), Receiver()
    signal.connect(receiver.on_task, weak=False)
    signal.connect(receiver.on_error, weak=False)
    assert [outcome for _, outcome in signal.send("sender", task_id="t-1")] == [None, None]
    assert receiver.received[0][0] == "sender"
    assert receiver.received[0][1]["task_id"] == "t-1"
    assert "on_error failed with ValueError" in caplog.text


def test_failing_logger_leaves_line_without_message(monkeypatch, capsys):
    """If logging fails, stderr gets a line without the message, which may hold a secret."""
    monkeypatch.setattr(
        logging.getLogger("z4j.runtime.safety"),
        "error",
        lambda *_args, **_options: fail(OSError("full")),
    )
    assert safe_call(fail, ValueError("a secret")) is None
    output = capsys.readouterr().err
    assert "fail failed with ValueError" in output
    assert "secret" not in output


def test_safe_log_extra_renames_reserved_keys():
    """Keys that ``logging`` reserves are renamed, so that they cannot break a log call."""
    extra = safe_log_extra({"message": 1, "args": 2, "name": 3, "asctime": 4, "mine": 5})
    assert extra == {
        "user_message": 1,
        "user_args": 2,
        "user_name": 3,
        "user_asctime": 4,
        "mine": 5,
    }
    logging.getLogger("z4j.test").warning("x", extra=extra)


def test_bare_framework_runs_hooks_in_order():
    """The adapter for no framework returns its configuration and runs hooks in order."""
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
