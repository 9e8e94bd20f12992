"""Discovers an engine's tasks. The definitions become items of a ``registry_delta`` frame."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from z4j_bare.wire.canonical import canonical
from z4j_bare.wire.fit import MAX_NAME_CHARS, MAX_TASK_NAME_CHARS, fit_name

if TYPE_CHECKING:
    from z4j_core.models import DiscoveryHints, TaskDefinition

    from z4j_bare.engines.host import EngineHost

#: Timeout of an adapter's ``discover_tasks`` in seconds. RQ's adapter reads every queue in Redis.
DISCOVERY_TIMEOUT = 60.0

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")


def discover(
    host: EngineHost, hints: DiscoveryHints, checkpoint: Callable[[], object]
) -> dict[str, bytes]:
    """Return the task definitions as canonical JSON, by task name.

    Raises every exception of the adapter.

    :param checkpoint: called between two steps, so that other greenlets can run.
    """
    found = {}
    for definition in _definitions(host, hints, checkpoint):
        checkpoint()
        body = definition.model_dump(mode="json")
        body["signature"] = strip_defaults(body.get("signature"))
        body["name"] = name = fit_name(str(definition.name), MAX_TASK_NAME_CHARS)
        if isinstance(queue := body.get("queue"), str):
            body["queue"] = fit_name(queue, MAX_NAME_CHARS)
        found[name] = canonical(host.redactor.scrub(body))
    return found


def task_directories(hints: DiscoveryHints) -> list[Path]:
    """Return the directories of the framework's apps and of the loaded ``tasks`` modules."""
    modules = [
        module for name, module in list(sys.modules.items()) if name.rpartition(".")[2] == "tasks"
    ]
    files = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    loaded = (file.parent for file in files if "site-packages" not in file.parts)
    return list(dict.fromkeys([*hints.app_paths, *loaded]))


def strip_defaults(signature: object) -> str | None:
    """Return a signature such as ``(user, key='s3cret')`` without its defaults.

    A default can be a secret. Returns ``None`` if ``signature`` is not text.
    """
    if not isinstance(signature, str):
        return None
    kept, depth, quote, default, escaped = [], 0, "", False, False
    for character in signature:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        else:
            depth += (character in _OPENING) - (character in _CLOSING)
            default = (
                (default or character == "=") and depth > 0 and (depth > 1 or character != ",")
            )
        if not default:
            kept.append(character)
    return "".join(kept)


def _definitions(
    host: EngineHost, hints: DiscoveryHints, checkpoint: Callable[[], object]
) -> Iterable[TaskDefinition]:
    found: Iterable[TaskDefinition] | None = host.description.iter_definitions(hints, checkpoint)
    if found is None:
        found = host.invoke("discover_tasks", timeout=DISCOVERY_TIMEOUT, hints={"hints": hints})
    return found or ()
