"""Writes ``configuration.md`` and ``contracts.md`` from the code, so that they cannot tell another story."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from z4j_core.config import resolver
from z4j_core.models import Config
from zope.interface import Interface
from zope.interface.interface import Method

from z4j_bare import interfaces, settings

_HEAD = "<!-- Written by docs/reference.py from the code: change that. -->\n\n"

#: What z4j_core's own fields mean to a user of this package; every one of them has to be here or in ``_INTERNAL``.
_CORE = {
    "brain_url": "The brain's address, `https://...`; plain `http` only to this machine, or with `dev_mode`.",
    "token": "The agent's token, as the brain showed it once.",
    "project_id": "The project's slug.",
    "hmac_secret": "The key that signs every frame, as the brain minted it: 32 bytes in urlsafe base64.",
    "agent_name": "What the dashboard calls this agent.",
    "agent_id": "Needed by nobody: the brain tells it.",
    "environment": "A label such as `production` or `staging`.",
    "tags": "Labels, `key=value,key=value`.",
    "transport": "See `Z4J_TRANSPORT` above.",
    "heartbeat_seconds": "Seconds between heartbeats; the brain may ask for fewer.",
    "buffer_max_events": "Rows of the buffer; above it the oldest events go, counted.",
    "buffer_max_bytes": "Bytes of the buffer's files, WAL included; likewise.",
    "max_payload_bytes": "Characters of one value that redaction lets through.",
    "log_level": "Level of the standalone agent's log.",
    "autostart": "Start with `install_agent`; off, call `runtime.start()` yourself.",
    "strict_mode": "Of framework adapters: fail the host's start when the agent cannot start.",
    "worker_role": "`web`, `task`, `scheduler`, `beat` or `other`; found out by itself.",
    "redaction_extra_key_patterns": "Regular expressions: values under matching keys are hidden. Comma-separated.",
    "redaction_extra_value_patterns": "Regular expressions: matching text is hidden. Comma-separated.",
}
#: Fields that a user does not set by name.
_INTERNAL = {"engines", "schedulers", "buffer_path", "dev_mode", "redaction_defaults_enabled"}


def write(folder: Path) -> None:
    """Write both pages into ``folder``; raises ``LookupError`` when a setting has no description."""
    (folder / "configuration.md").write_text(_HEAD + _configuration(), encoding="utf-8")
    (folder / "contracts.md").write_text(_HEAD + _contracts(), encoding="utf-8")


def _configuration() -> str:
    intro = (_written("configuration.in.md"), "\n## The agent's own settings\n")
    own = _table(["variable", "default", "meaning"], _own_settings())
    core = _table(["variable", "default", "meaning"], _core_settings())
    return "\n".join([*intro, own, "\n## Settings shared with z4j's other packages\n", core, ""])


def _written(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _own_settings() -> list[list[str]]:
    notes = _comments(settings.Settings)
    return [
        [f"`{each.metadata['variable']}`", _shown(each.default), notes[each.name]]
        for each in fields(settings.Settings)
    ]


def _core_settings() -> list[list[str]]:
    variables = {**resolver._FIELD_TO_ENV, **resolver._LIST_ENV_VARS, "tags": "Z4J_TAGS"}  # noqa: SLF001 - its only list
    if missing := set(Config.model_fields) - set(_CORE) - _INTERNAL:
        raise LookupError(f"no description of {sorted(missing)} in docs/reference.py")
    return [
        [
            f"`{variables[name]}`",
            _shown(Config.model_fields[name].get_default(call_default_factory=True)),
            text,
        ]
        for name, text in _CORE.items()
    ]


def _comments(kind: type) -> dict[str, str]:
    """Return the ``#:`` comment of every field; one without belongs to the field before it."""
    lines, found, pending, last = inspect.getsource(kind).splitlines(), {}, "", ""
    for line in map(str.strip, lines):
        if line.startswith("#:"):
            pending += " " + line[2:].strip()
        elif ": " in line and "= setting(" in line:
            last = pending.strip().replace("``", "`") or last
            found[line.split(":")[0]], pending = last, ""
    return found


def _shown(value: Any) -> str:
    if value is True or value is False:
        return "on" if value else "off"
    return (
        f"`{value}`"
        if isinstance(value, (int, float)) or (isinstance(value, str) and value)
        else "-"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _contracts() -> str:
    text = [_written("contracts.in.md")]
    # Interfaces do not keep their order; the source does.
    for node in ast.parse(inspect.getsource(interfaces)).body:
        contract = getattr(interfaces, getattr(node, "name", ""), None)
        if isinstance(contract, type(Interface)) and contract is not Interface:
            text.append(_contract(contract, node))
    return "\n".join(text)


def _contract(contract: Any, node: ast.ClassDef) -> str:
    parts = [f"\n## {contract.__name__}\n\n{_plain(contract.__doc__)}\n"]
    order = [
        item.name if isinstance(item, ast.FunctionDef) else item.target.id
        for item in node.body
        if _member(item)
    ]
    for name in order:
        member = contract[name]
        title = f"{name}{member.getSignatureString()}" if isinstance(member, Method) else name
        parts.append(f"`{title}`\n: {_plain(member.__doc__)}\n")
    return "\n".join(parts)


def _member(item: ast.stmt) -> bool:
    return isinstance(item, ast.FunctionDef) or (
        isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


def _plain(doc: str | None) -> str:
    """Return a docstring as Markdown: its few reStructuredText marks say what backticks say."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", inspect.cleandoc(doc or ""))
    text = re.sub(r":param (\w+):", r"- `\1`:", text).replace("``", "`")
    return text.replace("\n", "\n  ")
