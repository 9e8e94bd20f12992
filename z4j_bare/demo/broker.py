"""The broker between the demo's script and its worker.

The broker is either a server with a URL, or message files in the run's private directory.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_bare.demo.process import HarnessError
from z4j_bare.engines.celery.broker_errors import explain
from z4j_bare.engines.celery.engine import open_connection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

#: Environment variable that contains the path of the run's directory.
HOME = "DEMO_HOME"

#: Environment variable with the broker's URL; empty if message files are used.
BROKER = "DEMO_BROKER"

#: Timeout of the first connection to the broker, in seconds.
_CONNECT_TIMEOUT = 5


def environment(home: Path, broker: str | None) -> dict[str, str]:
    """Return the variables that :func:`settings_from_environment` reads in the worker."""
    return {HOME: str(home), BROKER: broker or ""}


def settings_from_environment() -> dict[str, Any]:
    """Return the Celery settings of a worker that was started with :func:`environment`."""
    return settings(Path(os.environ[HOME]), os.environ[BROKER] or None)


def settings(home: Path, broker: str | None) -> dict[str, Any]:
    """Return the Celery settings of a run in the directory ``home``.

    The names of queues, exchanges and keys contain the unique name of ``home``, because other
    applications may share the broker.

    :param broker: the broker's URL, or ``None`` for files in ``home``.
    """
    shared = {
        "result_backend": f"file://{_folder(home, 'results')}",
        "result_extended": True,  # A retry command reads the arguments from the result backend.
        "task_default_queue": home.name,
        "control_exchange": f"{home.name}.pidbox",
        "event_exchange": f"{home.name}.events",
        "broker_connection_retry_on_startup": True,
    }
    if broker:
        prefix = {"global_keyprefix": f"{home.name}:"} if broker.startswith("redis") else {}
        return {**shared, "broker_url": broker, "broker_transport_options": prefix}
    return {
        **shared,
        "broker_url": "filesystem://localhost",  # kombu warns about a URL without a host.
        "broker_transport": "z4j_bare.demo.atomic_fs_transport:Transport",
        "broker_transport_options": _folders(home),
    }


@contextmanager
def producer(home: Path, broker: str | None) -> Iterator[Celery]:
    """Yield a Celery application that sends tasks.

    At the end, delete the run's data from the broker.

    :raises HarnessError: the broker does not answer.
    """
    from celery import Celery

    with Celery("z4j_demo_script", changes=settings(home, broker)) as app:
        with app.connection_for_write() as connection:
            try:
                open_connection(connection, _CONNECT_TIMEOUT)
            except Exception as exc:  # Each transport raises different exceptions.
                cause, fix = explain(exc, connection)
                raise HarnessError(f"--broker: {cause}: {fix}") from exc
        try:
            yield app
        finally:
            if broker:
                _clear(app, home, broker)


def address(broker: str | None) -> str:
    """Return the broker's URL without the password, or ``files`` if the broker has no URL."""
    from kombu.utils.url import sanitize_url

    return str(sanitize_url(broker)) if broker else "files"


def _clear(app: Celery, home: Path, broker: str) -> None:
    """Delete the run's queue and, on AMQP, its exchanges.

    On Redis, also delete the run's keys, because kombu does not delete its binding keys.
    """
    control = f"{home.name}.pidbox.pidbox"  # kombu adds the second suffix
    try:
        with app.connection_for_write() as connection:
            app.amqp.queues[home.name].bind(connection.default_channel).delete()
            if connection.transport.driver_type == "amqp":
                for name in (home.name, f"{home.name}.events", control, f"reply.{control}"):
                    connection.default_channel.exchange_delete(name)
        if broker.startswith("redis"):
            from redis import Redis

            with Redis.from_url(broker) as client:
                for key in client.scan_iter(f"{home.name}:*"):
                    client.delete(key)
    except Exception:
        pass  # If the broker is unreachable, the run has already reported that.


def _folders(home: Path) -> dict[str, Any]:
    messages = _folder(home, "messages")
    return {
        "data_folder_in": messages,
        "data_folder_out": messages,
        "control_folder": _folder(home, "exchanges"),
        "processed_folder": _folder(home, "processed"),
        "store_processed": True,  # if false, kombu moves each message through /tmp
        "polling_interval": 0.1,
    }


def _folder(home: Path, name: str) -> str:
    folder = home / name
    folder.mkdir(exist_ok=True)
    return str(folder)
