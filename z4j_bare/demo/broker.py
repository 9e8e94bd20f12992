"""The broker between the demo's script and its worker: files in a private directory, or a real one."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_bare.demo.process import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from celery import Celery

HOME = "DEMO_HOME"
BROKER = "DEMO_BROKER"
_CONNECT_SECONDS = 5


def environment(home: Path, broker: str | None) -> dict[str, str]:
    """Return the variables that ``settings_from_environment`` reads in the worker."""
    return {HOME: str(home), BROKER: broker or ""}


def settings_from_environment() -> dict[str, Any]:
    """Return the Celery settings of a worker that was started with ``environment``."""
    return settings(Path(os.environ[HOME]), os.environ[BROKER] or None)


def settings(home: Path, broker: str | None) -> dict[str, Any]:
    """Return the Celery settings for a run in ``home``, on ``broker`` or else on files in there.

    On a broker that others use too, everything bears the home's name, which is unique.
    """
    shared = {
        "result_backend": f"file://{_folder(home, 'results')}",
        "result_extended": True,  # an operator's retry takes the arguments from the result backend
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
        "broker_url": "filesystem://localhost",  # the host only keeps kombu from warning that there is none
        "broker_transport": "z4j_bare.demo.atomic_fs_transport:Transport",
        "broker_transport_options": _folders(home),
    }


@contextmanager
def producer(home: Path, broker: str | None) -> Iterator[Celery]:
    """Yield the application that the script sends with; afterwards nothing of ours is left on the broker.

    Raises ``HarnessError`` when nobody answers there.
    """
    from celery import Celery

    with Celery("z4j_demo_script", changes=settings(home, broker)) as app:
        try:
            with app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=_CONNECT_SECONDS)
        except Exception as exc:  # each transport has errors of its own
            raise HarnessError(f"no broker answers at {address(broker)}: {exc}") from exc
        try:
            yield app
        finally:
            if broker:
                _clear(app, home, broker)


def address(broker: str | None) -> str:
    """Return how to call the broker in public: without its password."""
    from kombu.utils.url import sanitize_url

    return str(sanitize_url(broker)) if broker else "files"


def _clear(app: Celery, home: Path, broker: str) -> None:
    """Delete the queue, and on Redis kombu's tables of bindings, which outlive it."""
    try:
        with app.connection_for_write() as connection:
            app.amqp.queues[home.name].bind(connection.default_channel).delete()
        if broker.startswith("redis"):
            from redis import Redis

            with Redis.from_url(broker) as client:
                for key in client.scan_iter(f"{home.name}:*"):
                    client.delete(key)
    except Exception:
        pass  # the broker is gone; the run has said so already


def _folders(home: Path) -> dict[str, Any]:
    atomic_fs_transport = _folder(home, "spool")
    return {
        "data_folder_in": atomic_fs_transport,
        "data_folder_out": atomic_fs_transport,
        "control_folder": _folder(home, "exchanges"),
        "processed_folder": _folder(home, "processed"),
        "store_processed": True,  # otherwise kombu moves each message through the system's /tmp
        "polling_interval": 0.1,
    }


def _folder(home: Path, name: str) -> str:
    folder = home / name
    folder.mkdir(exist_ok=True)
    return str(folder)
