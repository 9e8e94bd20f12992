"""Constructs engine and scheduler adapters by name."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from z4j_core.errors import ConfigError

from z4j_bare.errors import HostConfigurationError
from z4j_bare.process import importing_application

logger = logging.getLogger("z4j.runtime.cli.adapters")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Describes how one kind of adapter is constructed.

    An adapter's package is imported only when an operator selects the adapter.
    So z4j-bare does not depend on the adapter packages.

    :param package: distribution to install. Its import package has the same name with underscores.
    :param attribute: name of the adapter's class in the package.
    :param parameter: constructor parameter that takes the application object.
    :param read: function that derives all constructor arguments from the application object. If
        ``read`` is set, ``parameter`` is not used.
    """

    package: str
    attribute: str
    parameter: str
    read: Callable[[Any], dict[str, object]] | None = None

    def build(self, app: str | None, options: Mapping[str, object], setting: str = "--app") -> Any:
        """Import the application and the adapter's package and return the adapter.

        Raises ``HostConfigurationError``. The message names what is missing or invalid.

        :param app: the application as ``module:attr``.
        :param options: further constructor arguments.
        :param setting: name of the setting that contains ``app``, for error messages.
        """
        application = load_app(app, setting)
        try:
            adapter = getattr(import_module(self.package.replace("-", "_")), self.attribute)
        except ImportError as error:
            raise HostConfigurationError(
                f"the adapter is not installed: pip install {self.package} ({error})"
            ) from error
        arguments = self.read(application) if self.read else {self.parameter: application}
        try:
            return adapter(**arguments, **options)
        except (TypeError, ValueError, AttributeError) as error:
            raise HostConfigurationError(
                f"cannot create {self.attribute} from {app}: {error}"
            ) from error


class _ArqSettings(Protocol):
    """Declares the attributes of an arq ``WorkerSettings`` class that this module reads."""

    functions: Sequence[object]
    redis_settings: object
    cron_jobs: Sequence[object]


def _read_arq_worker(settings: _ArqSettings) -> dict[str, object]:
    """Return constructor arguments for a ``WorkerSettings`` class or a redis settings object."""
    if not hasattr(settings, "functions"):
        return {"redis_settings": settings}
    names = [
        getattr(each, "name", None) or getattr(each, "__name__", str(each))
        for each in settings.functions
    ]
    arguments = {"redis_settings": settings.redis_settings, "function_names": names}
    queue = getattr(settings, "queue_name", None)
    return {**arguments, "queue_name": queue} if queue else arguments


def _read_arq_cron(settings: _ArqSettings) -> dict[str, object]:
    return {"cron_jobs": settings.cron_jobs}


ENGINES = {
    "celery": AdapterSpec("z4j-celery", "CeleryEngineAdapter", "celery_app"),
    "rq": AdapterSpec("z4j-rq", "RqEngineAdapter", "rq_app"),
    "dramatiq": AdapterSpec("z4j-dramatiq", "DramatiqEngineAdapter", "broker"),
    "huey": AdapterSpec("z4j-huey", "HueyEngineAdapter", "huey"),
    "arq": AdapterSpec("z4j-arq", "ArqEngineAdapter", "redis_settings", _read_arq_worker),
    "taskiq": AdapterSpec("z4j-taskiq", "TaskiqEngineAdapter", "broker"),
}

SCHEDULERS = {
    "celerybeat": AdapterSpec("z4j-celerybeat", "CeleryBeatSchedulerAdapter", "celery_app"),
    "apscheduler": AdapterSpec("z4j-apscheduler", "APSchedulerAdapter", "scheduler"),
    "rqscheduler": AdapterSpec("z4j-rqscheduler", "RqSchedulerAdapter", "scheduler"),
    "hueyperiodic": AdapterSpec("z4j-hueyperiodic", "HueyPeriodicAdapter", "huey"),
    "arqcron": AdapterSpec("z4j-arqcron", "ArqCronAdapter", "cron_jobs", _read_arq_cron),
    "taskiqscheduler": AdapterSpec("z4j-taskiqscheduler", "TaskiqSchedulerAdapter", "source"),
}


def canonical_name(name: str) -> str:
    """Return an adapter's key in :data:`ENGINES` or :data:`SCHEDULERS`.

    ``celery-beat``, ``celery_beat`` and ``z4j-celerybeat`` all become ``celerybeat``.
    """
    return re.sub(r"[-_]", "", name.strip().lower().removeprefix("z4j-"))


def require_known(name: str, specs: Mapping[str, AdapterSpec]) -> str:
    """Return the canonical name of an adapter.

    Raises ``HostConfigurationError`` for an unknown adapter; the message lists the valid names.
    """
    canonical = canonical_name(name)
    if canonical not in specs:
        raise HostConfigurationError(f"unknown adapter {name!r}: choose from {', '.join(specs)}")
    return canonical


def build(
    specs: Mapping[str, AdapterSpec], selected: Mapping[str, Mapping[str, Any]], app: str | None
) -> list[Any]:
    """Return the selected adapters.

    Raises ``HostConfigurationError`` if an adapter cannot be constructed.

    :param selected: constructor options by adapter name. The option ``app`` names the adapter's
        own application.
    :param app: the application of the adapters without an ``app`` option.
    """
    adapters = []
    for name, options in selected.items():
        arguments = {key: value for key, value in options.items() if key != "app"}
        own = options.get("app")
        setting = f"the app of {name}" if own else "--app"
        spec = specs[require_known(name, specs)]
        adapters.append(spec.build(own or app, arguments, setting))
    return adapters


def load_app(path: object, setting: str = "--app") -> object:
    """Import and return the application that ``module:attr`` or ``module.attr`` names.

    If the module calls ``install_agent``, the call starts no agent.
    Raises ``HostConfigurationError`` with a message that names ``setting`` and the problem.
    Raises the ``ConfigError`` that ``install_agent`` raises when the module calls it.
    """
    if not path:
        raise HostConfigurationError("--app MODULE:ATTR is required, such as --app shop.celery:app")
    if not isinstance(path, str):
        raise HostConfigurationError(f'{setting} is {path!r}, not of the form "module:attr"')
    module, separator, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not separator:
        raise HostConfigurationError(f"{setting} {path!r} is not of the form module:attr")
    application = _import_attribute(path, module, attribute, setting)
    if isinstance(application, ModuleType):
        raise HostConfigurationError(
            f"{setting} {path!r} is a module: add the name of the object in it, such as {path}:app"
        )
    return application


def _import_attribute(path: str, module: str, attribute: str, setting: str) -> object:
    if "" not in sys.path:
        # The app is usually in the working directory. `celery -A` searches that directory as well.
        sys.path.insert(0, "")
    try:
        with importing_application():
            return getattr(import_module(module), attribute)
    except ConfigError:  # The application's install_agent failed. The message names the setting.
        raise
    except (ImportError, AttributeError, ValueError) as error:
        # import_module raises ValueError if the module name is empty.
        hint = "" if ":" in path else "; is it of the form module:attr?"
        raise HostConfigurationError(f"cannot load {setting} {path!r}: {error}{hint}") from error
    except Exception as error:
        # The application's code failed, for example because an environment variable is missing.
        logger.debug("z4j: importing %s failed", module, exc_info=True)
        cause = f"{type(error).__name__}: {error}"
        raise HostConfigurationError(
            f"cannot load {setting} {path!r}: {cause} (--log-level DEBUG logs the traceback)"
        ) from error
