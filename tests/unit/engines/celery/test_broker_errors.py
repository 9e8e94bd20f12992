"""The explanations of refused connections to a broker."""

import logging

import pytest

pytest.importorskip("celery")

from amqp.exceptions import AccessRefused, NotAllowed
from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError

from z4j_bare.engines.celery.broker_errors import RefusalHint, explain


@pytest.fixture
def connection():
    """A connection that is not open."""
    return Connection("amqp://shop:hunter2@rabbit:5672/orders")


def wrapped(error):
    """Return an exception as kombu raises it instead of the transport's."""
    outer = OperationalError(str(error))
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    ("error", "cause", "fix"),
    [
        (
            NotAllowed("NOT_ALLOWED - vhost orders not found", (10, 40)),
            "refuses the virtual host 'orders': NOT_ALLOWED - vhost orders not found",
            "rabbitmqctl set_permissions -p 'orders' 'shop' '.*' '.*' '.*'",
        ),
        (
            AccessRefused("ACCESS_REFUSED - Login was refused", (0, 0)),
            "refuses the user: ACCESS_REFUSED - Login was refused",
            "correct user and password",
        ),
        (
            ConnectionRefusedError(111, "Connection refused"),
            "no broker answers at amqp://shop:**@rabbit:5672/orders: [Errno 111]",
            "correct the address",
        ),
        (
            TimeoutError(),
            "no broker answers at amqp://shop:**@rabbit:5672/orders: TimeoutError",
            "",
        ),
    ],
)
def test_cause_and_fix_of_refused_connection(connection, error, cause, fix, wrap):
    """Virtual host, user and address are told apart, and no text contains the password."""
    found = explain(wrap(error), connection)
    assert cause in found[0]
    assert fix in found[1]
    assert "hunter2" not in "".join(found)


@pytest.fixture
def app():
    with Celery(broker="amqp://shop:hunter2@rabbit/orders", set_as_current=False) as app:
        yield app


def log_refusal(hint, error):
    """Log a line as Celery does, and return whether it is kept."""
    values = ("amqp://shop:**@rabbit/orders", error, "Trying again")
    text = "consumer: Cannot connect to %s: %s.\n%s\n"
    return hint.filter(logging.LogRecord("celery", logging.ERROR, "", 1, text, values, None))


def test_hint_follows_refusal_once_a_minute(app, caplog):
    """Celery's lines are kept, and one a minute is followed by the fix."""
    now = [0.0]
    hint = RefusalHint(app, clock=lambda: now[0])
    for now[0] in (0.0, 1.0, 59.0, 60.0):
        assert log_refusal(hint, NotAllowed("NOT_ALLOWED - vhost orders not found", (10, 40)))
    lines = [each.getMessage() for each in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("z4j: no task can arrive: the broker at amqp://shop:**@rabbit")
    assert lines[0].endswith("'orders' 'shop' '.*' '.*' '.*' (setting: broker_url)")


@pytest.mark.parametrize("error", [ConnectionRefusedError(), "text", None])
def test_other_lines_have_no_hint(app, caplog, error):
    """A broker that does not answer is explained by Celery's own line."""
    assert log_refusal(RefusalHint(app), error)
    assert caplog.records == []


def test_line_without_values_is_kept(app):
    """A line without values, or with a dictionary of values, is kept."""
    for values in ((), None, ({"error": 1},)):
        record = logging.LogRecord("celery", logging.ERROR, "", 1, "text", values, None)
        assert RefusalHint(app).filter(record)
