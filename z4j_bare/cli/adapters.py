"""Engines and schedulers by name. An adapter is imported when it is asked for, so none has to be installed for another."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from z4j_bare.cli.apps import load_app
from z4j_bare.errors import HostConfigurationError


@dataclass(frozen=True, slots=True)
class Kind:
    """How an adapter is made of what the operator named.

    :param package: the distribution to install; the import package is its name with an underscore.
    :param parameter: the constructor's name for the application object.
    :param read: makes the constructor's arguments of that object, where one parameter will not do.
    """

    package: str
    attribute: str
    parameter: str
    read: Callable[[Any], dict[str, Any]] | None = None

    def build(self, app: str | None, options: Mapping[str, Any], setting: str = "--app") -> Any:
        """Import what is needed and return the adapter. Raises ``HostConfigurationError`` naming what is missing.

        ``setting`` is where the operator named ``app``.
        """
        found = load_app(app, setting)
        try:
            adapter = getattr(import_module(self.package.replace("-", "_")), self.attribute)
        except ImportError as error:
            raise HostConfigurationError(
                f"the adapter is missing: pip install {self.package} ({error})"
            ) from error
        try:
            return adapter(
                **(self.read(found) if self.read else {self.parameter: found}), **options
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise HostConfigurationError(
                f"{self.attribute} cannot be made of {app}: {error}"
            ) from error


def _arq_worker(settings: Any) -> dict[str, Any]:
    """Read arq's ``WorkerSettings``; its redis settings alone will do as well."""
    if not hasattr(settings, "functions"):
        return {"redis_settings": settings}
    names = [
        getattr(each, "name", None) or getattr(each, "__name__", str(each))
        for each in settings.functions
    ]
    found = {"redis_settings": settings.redis_settings, "function_names": names}
    queue = getattr(settings, "queue_name", None)
    return {**found, "queue_name": queue} if queue else found


def _arq_cron(settings: Any) -> dict[str, Any]:
    return {"cron_jobs": settings.cron_jobs}


ENGINES = {
    "celery": Kind("z4j-celery", "CeleryEngineAdapter", "celery_app"),
    "rq": Kind("z4j-rq", "RqEngineAdapter", "rq_app"),
    "dramatiq": Kind("z4j-dramatiq", "DramatiqEngineAdapter", "broker"),
    "huey": Kind("z4j-huey", "HueyEngineAdapter", "huey"),
    "arq": Kind("z4j-arq", "ArqEngineAdapter", "redis_settings", _arq_worker),
    "taskiq": Kind("z4j-taskiq", "TaskiqEngineAdapter", "broker"),
}

SCHEDULERS = {
    "celerybeat": Kind("z4j-celerybeat", "CeleryBeatSchedulerAdapter", "celery_app"),
    "apscheduler": Kind("z4j-apscheduler", "APSchedulerAdapter", "scheduler"),
    "rqscheduler": Kind("z4j-rqscheduler", "RqSchedulerAdapter", "scheduler"),
    "hueyperiodic": Kind("z4j-hueyperiodic", "HueyPeriodicAdapter", "huey"),
    "arqcron": Kind("z4j-arqcron", "ArqCronAdapter", "cron_jobs", _arq_cron),
    "taskiqscheduler": Kind("z4j-taskiqscheduler", "TaskiqSchedulerAdapter", "source"),
}


def canonical(name: str) -> str:
    """Return an adapter's name as it is a key here: ``celery-beat`` and ``z4j-celerybeat`` are the same."""
    return re.sub(r"[-_]", "", name.strip().lower().removeprefix("z4j-"))


def known(name: str, kinds: Mapping[str, Kind]) -> str:
    """Return the canonical name. Raises ``HostConfigurationError`` listing the names there are."""
    found = canonical(name)
    if found not in kinds:
        raise HostConfigurationError(f"{name!r} is none of {', '.join(kinds)}")
    return found


def build(
    kinds: Mapping[str, Kind], wanted: Mapping[str, Mapping[str, Any]], app: str | None
) -> list[Any]:
    """Return the adapters; ``wanted`` has options by name, of which ``app`` defaults to the common one."""
    made = []
    for name, options in wanted.items():
        rest = {key: value for key, value in options.items() if key != "app"}
        own = options.get("app")
        made.append(
            kinds[known(name, kinds)].build(
                own or app, rest, f"the app of {name}" if own else "--app"
            )
        )
    return made
