"""Importing what an operator names: ``module:attr``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from z4j_bare.errors import HostConfigurationError


def load_app(path: str | None) -> Any:
    """Import ``module:attr`` or ``module.attr``. Raises ``HostConfigurationError`` saying what is missing."""
    if not path:
        raise HostConfigurationError("--app MODULE:ATTR is required, such as --app shop.celery:app")
    module, separator, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not separator:
        raise HostConfigurationError(f"--app {path!r} is not of the form module:attr")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as celery -A does: the app usually lies in the working directory
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError for an empty module name
        raise HostConfigurationError(f"--app {path!r} cannot be loaded: {error}") from error
