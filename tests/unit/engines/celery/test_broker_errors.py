"""The explanations of refused connections to a broker."""

import pytest

pytest.importorskip("celery")

from amqp.exceptions import AccessRefused, NotAllowed
from kombu import Connection
from kombu.exceptions import OperationalError

from z4j_bare.engines.celery.broker_errors import explain


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
