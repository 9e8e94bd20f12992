"""What the demo's worker and its script have to agree on about the broker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HOME = "DEMO_HOME"
BROKER = "DEMO_BROKER"


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
        "broker_transport": "z4j_bare.demo.spool:Transport",
        "broker_transport_options": _folders(home),
    }


def _folders(home: Path) -> dict[str, Any]:
    spool = _folder(home, "spool")
    return {
        "data_folder_in": spool,
        "data_folder_out": spool,
        "control_folder": _folder(home, "exchanges"),
        "processed_folder": _folder(home, "processed"),
        "store_processed": True,  # otherwise kombu moves each message through the system's /tmp
        "polling_interval": 0.1,
    }


def _folder(home: Path, name: str) -> str:
    folder = home / name
    folder.mkdir(exist_ok=True)
    return str(folder)
