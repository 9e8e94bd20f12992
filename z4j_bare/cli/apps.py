"""Importing what an operator names: ``module:attr``."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from z4j_core.errors import ConfigError

from z4j_bare.errors import HostConfigurationError
from z4j_bare.process import importing_application

logger = logging.getLogger("z4j.runtime.cli")


def load_app(path: Any, setting: str = "--app") -> Any:
    """Import ``module:attr`` or ``module.attr``; an agent that it installs stays out.

    Raises ``HostConfigurationError`` naming the ``setting`` that it comes from and what is wrong, or the ``ConfigError`` of
    the application's own ``install_agent``.
    """
    if not path:
        raise HostConfigurationError("--app MODULE:ATTR is required, such as --app shop.celery:app")
    if not isinstance(path, str):
        raise HostConfigurationError(f'{setting} is {path!r}, not of the form "module:attr"')
    module, separator, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not separator:
        raise HostConfigurationError(f"{setting} {path!r} is not of the form module:attr")
    found = _imported(path, module, attribute, setting)
    if isinstance(found, ModuleType):
        raise HostConfigurationError(
            f"{setting} {path!r} is a module: name the object in it, such as {path}:app"
        )
    return found


def _imported(path: str, module: str, attribute: str, setting: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as celery -A does: the app usually lies in the working directory
    try:
        with importing_application():
            return getattr(import_module(module), attribute)
    except ConfigError:  # of its own install_agent, which has said what is wrong
        raise
    except (
        ImportError,
        AttributeError,
        ValueError,
    ) as error:  # ValueError for an empty module name
        hint = "" if ":" in path else "; is it of the form module:attr?"
        raise HostConfigurationError(
            f"{setting} {path!r} cannot be loaded: {error}{hint}"
        ) from error
    except Exception as error:  # the application's own: a variable that it misses, a file
        logger.debug("z4j: importing %s failed", module, exc_info=True)
        text = f"{setting} {path!r} cannot be loaded: {type(error).__name__}: {error} (--log-level DEBUG shows where)"
        raise HostConfigurationError(text) from error
