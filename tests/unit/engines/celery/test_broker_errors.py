"""The explanations of refused connections to a broker."""

import logging
import shlex
import socket
import ssl
import threading
from contextlib import contextmanager, suppress

import pytest

pytest.importorskip("celery")

from amqp.exceptions import AccessRefused, NotAllowed
from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError

from tests.support import certificates
from z4j_bare.engines.celery.broker_errors import RefusalHint, explain, is_refusal
from z4j_bare.engines.celery.engine import broker_connection, open_connection


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
            NotAllowed("NOT_ALLOWED - access refused: connection limit (1) is reached", (10, 40)),
            "refuses another connection: NOT_ALLOWED - access refused: connection limit (1)",
            "rabbitmqctl list_vhost_limits",
        ),
        (
            ConnectionRefusedError(111, "Connection refused"),
            "no broker answers at amqp://shop:**@rabbit:5672/orders: [Errno 111]",
            "correct host and port of the address",
        ),
        (
            TimeoutError(),
            "no broker answers at amqp://shop:**@rabbit:5672/orders: TimeoutError",
            "firewall",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            "the host name of the broker at amqp://shop:**@rabbit:5672/orders cannot be resolved",
            "correct the host name",
        ),
        (
            OSError("Server unexpectedly closed connection"),
            "ends the connection before the login: Server unexpectedly closed connection",
            "a port with TLS needs amqps://",
        ),
        (
            ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"),
            "the TLS handshake with the broker at amqp://shop:**@rabbit:5672/orders failed",
            "a port without TLS needs amqp://",
        ),
    ],
)
def test_cause_and_fix_of_refused_connection(connection, error, cause, fix, wrap):
    """Virtual host, user and address are told apart, and no text contains the password."""
    found = explain(wrap(error), connection)
    assert cause in found[0]
    assert fix in found[1]
    assert "hunter2" not in "".join(found)


def test_names_are_quoted_for_shell():
    """The commands of the fix work with every name of a virtual host and of a user."""
    connection = Connection("amqp://o%27neil:hunter2@rabbit/a%20b%27%24c%2F")
    fix = explain(NotAllowed("NOT_ALLOWED - vhost not found", (10, 40)), connection)[1]
    command = fix.rpartition("; ")[2]
    assert shlex.split(command)[2:5] == ["-p", "a b'$c/", "o'neil"]


@contextmanager
def serving(answer):
    """Call ``answer(client)`` for each connection to a port of 127.0.0.1, and yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with suppress(OSError):  # of the closed listener
                while True:
                    client, _ = listener.accept()
                    with client, suppress(OSError):
                        answer(client)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def plain_answer(client):
    client.recv(1000)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def tls_answer(context):
    def answer(client):
        with suppress(OSError), context.wrap_socket(client, server_side=True) as wrapped:
            wrapped.recv(1000)

    return answer


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
@pytest.mark.parametrize(
    ("tls_port", "tls_client", "message"),
    [
        (True, False, "ends the connection before the login"),
        (False, False, "ends the connection before the login"),
        (False, True, "the TLS handshake with the broker"),
        (True, True, "failed verification: self-signed certificate"),
    ],
)
def test_port_with_other_protocol_is_explained(tmp_path, scheme, tls_port, tls_client, message):
    """Errors of real connections say whether TLS is missing, not expected or not trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.make(tmp_path / "peer.pem"))
    with serving(tls_answer(context) if tls_port else plain_answer) as port:
        url = f"{scheme}{'s' if tls_client else ''}://shop:hunter2@127.0.0.1:{port}/0"
        required = {"cert_reqs" if scheme == "amqp" else "ssl_cert_reqs": ssl.CERT_REQUIRED}
        with Celery(broker=url, set_as_current=False) as app:
            app.conf.broker_use_ssl = required if tls_client else None
            connection = broker_connection(app, reading=True)
            with pytest.raises(Exception) as caught:
                open_connection(connection, 5.0)
            assert message in explain(caught.value, connection)[0]
            assert is_refusal(caught.value)


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


def test_ended_connections_have_hint_if_they_repeat(app, caplog):
    """Two ended connections are part of an outage; three within a minute may be a wrong port."""
    now = [0.0]
    hint = RefusalHint(app, clock=lambda: now[0])
    for now[0] in (0.0, 2.0, 100.0, 102.0):
        assert log_refusal(hint, ConnectionResetError(104, "Connection reset by peer"))
    assert caplog.records == []
    now[0] = 106.0
    assert log_refusal(hint, ConnectionResetError(104, "Connection reset by peer"))
    assert "a port with TLS needs amqps://" in caplog.records[0].getMessage()


@pytest.mark.parametrize("error", [ConnectionRefusedError(), TimeoutError(), "text", None])
def test_other_lines_have_no_hint(app, caplog, error):
    """A broker that does not answer is explained by Celery's own line."""
    assert log_refusal(RefusalHint(app), error)
    assert caplog.records == []


def test_line_without_values_is_kept(app):
    """A line without values, or with a dictionary of values, is kept."""
    for values in ((), None, ({"error": 1},)):
        record = logging.LogRecord("celery", logging.ERROR, "", 1, "text", values, None)
        assert RefusalHint(app).filter(record)
