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

#: AMQP's reply codes for a refused virtual host and for a refused login.
_NOT_ALLOWED = 530
_ACCESS_REFUSED = 403

#: Minimum time between two hints, in seconds.
_HINT_INTERVAL = 60.0

_FIX_ADDRESS = "start the broker, or correct the address"


def explain(error: BaseException, connection: Connection) -> tuple[str, str]:
    """Return why connecting failed, and what to do.

    :param error: the exception that the connection raised. kombu wraps the broker's own exception.
    :param connection: the connection, which need not be open.
    """
    original = _original(error)
    address = connection.as_uri()  # with ** in place of the password
    user, vhost = connection.userid, connection.virtual_host
    code = getattr(original, "reply_code", None)
    if code == _NOT_ALLOWED:
        fix = (
            "correct the address, or create the virtual host and the user's permissions: "
            f"rabbitmqctl add_vhost '{vhost}'; "
            f"rabbitmqctl set_permissions -p '{vhost}' '{user}' '.*' '.*' '.*'"
        )
        return f"the broker at {address} refuses the virtual host {vhost!r}: {_text(original)}", fix
    if is_refusal(error):
        return (
            f"the broker at {address} refuses the user: {_text(original)}",
            "correct user and password of the address",
        )
    return f"no broker answers at {address}: {_text(original)}", _FIX_ADDRESS


class RefusalHint(logging.Filter):
    """Logs the fix beside a line of Celery about a broker that refuses the worker.

    Celery repeats its line for ever, up to a hundred times a second. While a worker starts, its
    agent cannot report the cause to the brain: the agent starts when the worker is ready.

    :param app: the worker's application.
    """

    def __init__(self, app: Celery, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._app = app
        self._clock = clock
        self._logged_at = float("-inf")

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
                self._logged_at = now
                logger.warning("z4j: no task can arrive: %s", explain_refusal(error, self._app))
                return


def explain_refusal(error: BaseException, app: Celery) -> str:
    """Return why the broker refuses an application, and what to do."""
    cause, fix = explain(error, broker_connection(app, reading=True))
    return f"{cause}: {fix} (setting: broker_url)"


def is_refusal(error: BaseException) -> bool:
    """Return whether the broker has answered, but refuses the virtual host or the user."""
    original = _original(error)
    code = getattr(original, "reply_code", None)
    # redis-py's class; importing it would import redis.
    return (
        code in {_NOT_ALLOWED, _ACCESS_REFUSED} or type(original).__name__ == "AuthenticationError"
    )


def _original(error: BaseException) -> BaseException:
    """Return the exception of the transport, which kombu wraps."""
    return error.__cause__ or error


def _text(error: BaseException) -> str:
    """Return the broker's reply, or the exception's text, without the name of AMQP's method."""
    return str(getattr(error, "reply_text", "") or str(error) or type(error).__name__)
