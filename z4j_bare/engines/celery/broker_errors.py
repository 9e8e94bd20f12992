"""Explains why a broker refuses a connection, in a text without passwords."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from z4j_bare.engines.celery.engine import broker_connection
from z4j_bare.safety import safe_call

if TYPE_CHECKING:
    from celery import Celery
    from kombu import Connection

logger = logging.getLogger("z4j.runtime.engines.celery.broker_errors")

#: The logger to which Celery writes why a worker cannot connect.
_CELERY_LOGGER = "celery.worker.consumer.consumer"

#: AMQP's reply code for a refused virtual host.
_NOT_ALLOWED = 530
#: AMQP's reply code for a refused login.
_ACCESS_REFUSED = 403

#: Error texts of the transports when the peer ends the connection or speaks another protocol.
_ENDED_BY_PEER = (
    "Server unexpectedly closed connection",
    "Connection closed by server",
    "Protocol Error",
)

#: Minimum time between two hints, in seconds.
_HINT_INTERVAL = 60.0

#: Number of connections that the peer must end before the hint is logged.
_CLOSED_BEFORE_HINT = 3

_FIX_SCHEME = (
    "if the broker is up, check port and scheme of the address, and broker_use_ssl: a port with "
    "TLS needs amqps:// or rediss://, a port without TLS needs amqp:// or redis://"
)


def explain(error: BaseException, connection: Connection) -> tuple[str, str]:
    """Return why connecting failed, and what to do.

    :param error: the exception that the connection raised. kombu wraps the broker's own exception.
    :param connection: the connection, which need not be open.
    """
    original = _original(error)
    address = connection.as_uri()  # with ** in place of the password
    if getattr(original, "reply_code", None) == _NOT_ALLOWED:
        return _explain_virtual_host(original, connection, address)
    if _is_answered_refusal(error):
        return (
            f"the broker at {address} refuses the user: {_text(original)}",
            "correct user and password of the address",
        )
    return _explain_network(error, address)


def _explain_virtual_host(
    error: BaseException, connection: Connection, address: str
) -> tuple[str, str]:
    text, vhost = _text(error), connection.virtual_host
    if "connection limit (" in text:
        fix = (
            "close connections, or raise the limit: rabbitmqctl list_vhost_limits, "
            "rabbitmqctl list_user_limits"
        )
        return f"the broker at {address} refuses another connection: {text}", fix
    name, user = _quoted(vhost), _quoted(connection.userid)
    fix = (
        "correct the address, or create the virtual host and the user's permissions: "
        f"rabbitmqctl add_vhost {name}; "
        f"rabbitmqctl set_permissions -p {name} {user} '.*' '.*' '.*'"
    )
    return f"the broker at {address} refuses the virtual host {vhost!r}: {text}", fix


def _explain_network(error: BaseException, address: str) -> tuple[str, str]:
    from socket import gaierror
    from ssl import SSLCertVerificationError, SSLError

    text = _text(_original(error))
    found = _system_error(error)
    if isinstance(found, SSLCertVerificationError):
        why = found.verify_message
        return (
            f"the certificate of the broker at {address} failed verification: {why}",
            "name the certificate's authority in broker_use_ssl, or in ssl_ca_certs of the address",
        )
    if isinstance(found, SSLError):
        return f"the TLS handshake with the broker at {address} failed: {text}", _FIX_SCHEME
    if isinstance(found, gaierror):
        return (
            f"the host name of the broker at {address} cannot be resolved: {text}",
            "correct the host name of the address, or this host's name servers",
        )
    if isinstance(found, TimeoutError):
        return (
            f"no broker answers at {address}: {text}",
            "check whether a firewall blocks the connection, and host and port of the address",
        )
    if _is_closed(error):
        return (
            f"what answers at {address} ends the connection before the login: {text}",
            _FIX_SCHEME,
        )
    return (
        f"no broker answers at {address}: {text}",
        "start the broker, or correct host and port of the address",
    )


class RefusalHint(logging.Filter):
    """Logs the fix after Celery has logged that the broker refuses the worker.

    Celery repeats its log line for ever, up to a hundred times a second. The agent cannot report
    the cause to the brain, because it starts only when the worker is ready.

    :param app: the worker's application.
    """

    def __init__(self, app: Celery, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._app = app
        self._clock = clock
        self._logged_at = float("-inf")
        self._closed = 0
        self._closed_at = float("-inf")

    def install(self) -> None:
        """Read the lines that Celery logs from now on."""
        logging.getLogger(_CELERY_LOGGER).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return ``True``: Celery's lines are kept."""
        safe_call(self._log_hint, record.args)
        return True

    def _log_hint(self, values: object) -> None:
        now = self._clock()
        if not isinstance(values, tuple) or now - self._logged_at < _HINT_INTERVAL:
            return
        for error in values:
            if isinstance(error, BaseException) and is_refusal(error):
                if not self._lasts(error, now):
                    return
                self._logged_at = now
                logger.warning("z4j: no task can arrive: %s", explain_refusal(error, self._app))
                return

    def _lasts(self, error: BaseException, now: float) -> bool:
        """Return whether an error may last longer than a short outage.

        A broker that stops, or a proxy in front of it, ends only one or two connections.
        """
        if not _is_closed(error):
            return True
        if now - self._closed_at > _HINT_INTERVAL:
            self._closed = 0
        self._closed, self._closed_at = self._closed + 1, now
        return self._closed >= _CLOSED_BEFORE_HINT


def explain_refusal(error: BaseException, app: Celery) -> str:
    """Return why the broker refuses an application, and what to do."""
    cause, fix = explain(error, broker_connection(app, reading=True))
    return f"{cause}: {fix} (setting: broker_url)"


def is_refusal(error: BaseException) -> bool:
    """Return whether connecting may fail until a setting of this host or the broker is changed."""
    from socket import gaierror
    from ssl import SSLError

    permanent = isinstance(_system_error(error), SSLError | gaierror)
    return permanent or _is_answered_refusal(error) or _is_closed(error)


def _is_answered_refusal(error: BaseException) -> bool:
    """Return whether the broker has answered, but refuses the virtual host or the user."""
    original = _original(error)
    code = getattr(original, "reply_code", None)
    # redis-py's class; importing it would import redis.
    return (
        code in {_NOT_ALLOWED, _ACCESS_REFUSED} or type(original).__name__ == "AuthenticationError"
    )


def _is_closed(error: BaseException) -> bool:
    """Return whether the other side has ended the connection, or does not speak the protocol."""
    found = _system_error(error)
    if isinstance(found, ConnectionResetError | BrokenPipeError):
        return True
    text = _text(_original(error))
    return any(each in text for each in _ENDED_BY_PEER)


def _system_error(error: BaseException) -> OSError | None:
    """Return the operating system's error, which the transport or kombu may have wrapped."""
    return next((each for each in causes(error) if isinstance(each, OSError)), None)


def causes(error: BaseException) -> list[BaseException]:
    """Return ``error`` and the exceptions that have caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _quoted(name: str) -> str:
    """Return a name quoted as an argument of a shell command."""
    return "'" + name.replace("'", "'\\''") + "'"


def _original(error: BaseException) -> BaseException:
    """Return the exception of the transport, which kombu wraps."""
    return error.__cause__ or error


def _text(error: BaseException) -> str:
    """Return the broker's reply without the name of AMQP's method, or else the exception's text."""
    return str(getattr(error, "reply_text", "") or str(error) or type(error).__name__)
