"""The probe of an application's broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from z4j_bare.diagnostics.result import ProbeResult, failed, passed

if TYPE_CHECKING:
    from celery import Celery

_NAME = "broker"

#: Seconds after which a request to the broker fails.
_MAX_WAIT = 5.0


def is_celery(app: object) -> bool:
    """Whether ``app`` is a Celery application, which :func:`probe_broker` needs."""
    return hasattr(app, "connection_for_read") and hasattr(app, "amqp")


def probe_broker(app: Celery) -> ProbeResult:
    """Connect to the broker of a Celery application, as its workers do."""
    from z4j_bare.engines.celery.broker_errors import explain
    from z4j_bare.engines.celery.engine import broker_connection, open_connection

    with broker_connection(app, reading=True) as connection:
        address = connection.as_uri()
        try:
            open_connection(connection, _MAX_WAIT)
        except Exception as error:  # Each transport raises different exceptions.
            cause, fix = explain(error, connection)
            return failed(_NAME, cause, f"{fix} (setting: broker_url)", address=address)
    return passed(_NAME, f"connected to {address}", address=address)
