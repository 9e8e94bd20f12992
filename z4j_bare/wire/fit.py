"""Makes ids, names and texts fit for the columns of the brain's database.

PostgreSQL rejects a text that contains NUL or is longer than its column. The brain drops an event
with such a text but acknowledges it. The task would stay ``started`` for ever, or would never
appear. Therefore the agent changes such texts before it stores an event, and lists the changed
fields in the event (``docs/protocol.md``, "Events").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

#: Replaces NUL and lone surrogates.
REPLACEMENT = "\ufffd"

#: Width in characters of the brain's columns for a task id.
#: The column for a command's target contains ``engine:task_id``.
ID_COLUMN_CHARS = 200

#: Width in characters of the brain's column for the name of a task.
MAX_TASK_NAME_CHARS = 500

#: Width in characters of the brain's columns for the names of queues and workers.
MAX_NAME_CHARS = 200

#: Maximum characters of a task id that fits with every engine name, of up to 40 characters.
SHORT_ID_CHARS = ID_COLUMN_CHARS - 41

#: Maximum number of remembered originals of changed texts. They take at most 16 MB.
MAX_ORIGINALS = 4096

#: Maximum characters of a remembered original.
MAX_ORIGINAL_CHARS = 4096

#: The key of an event's data whose value lists the changed fields of the event.
MARK = "fitted"

#: The entry of the list ``fitted`` if NUL characters were replaced in any value or key.
NUL_MARK = "nul"

#: Fields of an event's data that contain a task id.
_ID_FIELDS = ("parent_task_id", "root_task_id")

#: Fields of an event's data that contain a name, with the maximum characters.
_NAME_FIELDS = {
    "task_name": MAX_TASK_NAME_CHARS,
    "queue": MAX_NAME_CHARS,
    "worker": MAX_NAME_CHARS,
}

#: Number of changed events of this process, by changed field.
#: Flush loops and the adoption of another agent's buffers change the counter.
fitted: Counter[str] = Counter()

#: Maps each changed text to its original text.
#: The original is ``None`` if it is very long, or if several originals became the same text.
_originals: dict[str, str | None] = {}

_HASH_CHARS = 32
_is_short_id = re.compile(rf".+~[0-9a-f]{{{_HASH_CHARS}}}", re.DOTALL).fullmatch

#: Matches an escaped NUL in JSON and the pairs of backslashes before it.
#: Each pair is an escaped backslash and stays unchanged.
_ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def max_id_chars(engine: str) -> int:
    """Return the maximum number of characters of an engine's task ids: 193 for Celery."""
    return ID_COLUMN_CHARS - len(engine) - 1


def has_nul(encoded: str) -> bool:
    """Whether a JSON text contains NUL in a value or a key."""
    # The search for one character takes 20 ns, so it comes first.
    # The search for six characters takes 170 ns.
    return "\\" in encoded and "\\u0000" in encoded and _ESCAPED_NUL.search(encoded) is not None


def replace_nul(encoded: str) -> str:
    """Replace every NUL in a JSON text. The keys of the result may be unsorted."""
    return _ESCAPED_NUL.sub(rf"\1{REPLACEMENT}", encoded) if has_nul(encoded) else encoded


def fit_id(task_id: str, engine: str) -> str:
    """Return a task id without NUL that fits into the brain's columns.

    An id that is too long is cut, and ``~`` and a hash of the whole id are appended.
    """
    limit, valid = max_id_chars(engine), _valid(task_id)
    if len(valid) > limit:
        digest = sha256(task_id.encode(errors="surrogatepass")).hexdigest()[:_HASH_CHARS]
        valid = f"{valid[: limit - _HASH_CHARS - 1]}~{digest}"
    return _remember(valid, task_id) if valid != task_id else valid


def fit_name(name: str, limit: int = MAX_NAME_CHARS) -> str:
    """Return a name without NUL and of at most ``limit`` characters.

    A name that is too long is cut. A name of exactly ``limit`` characters is remembered as well,
    because it looks like a name that was cut.
    """
    shown = _valid(name)[:limit]
    return _remember(shown, name) if shown != name or len(name) == limit else shown


def original(shown: str) -> str | None:
    """Return the original of ``shown``, which is an id or a name from the brain.

    Returns ``None`` for a changed text whose original is not known: another process sent the text,
    the original was forgotten, or several originals became the same text.
    """
    if shown in _originals:
        return _originals[shown]
    return None if _looks_changed(shown) else shown


def is_fit(data: Mapping[str, Any]) -> bool:
    """Whether the ids and names of an event's data are short enough. NUL is not checked.

    A name of exactly the maximum length counts as too long, because :func:`fit_name` must remember
    it. Raises ``TypeError`` for an id or a name without a length, such as a number.
    """
    # Written without a loop for speed, because this function runs for every failed task.
    get = data.get
    return (
        len(get("task_name") or "") < MAX_TASK_NAME_CHARS
        and len(get("queue") or "") < MAX_NAME_CHARS
        and len(get("worker") or "") < MAX_NAME_CHARS
        and len(get("parent_task_id") or "") <= SHORT_ID_CHARS
        and len(get("root_task_id") or "") <= SHORT_ID_CHARS
    )


def fit_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return an event's fields with ids and names that fit, and the names of the changed fields.

    NUL in other values is left to :func:`replace_nul`.
    """
    engine, data, changed = str(fields["engine"]), dict(fields.get("data") or {}), []
    task_id = fields["task_id"]
    result = {**fields, "data": data}
    if isinstance(task_id, str) and (fit := fit_id(task_id, engine)) != task_id:
        result["task_id"] = fit
        changed.append("task_id")
    for field in _ID_FIELDS:
        value = data.get(field)
        if isinstance(value, str) and (fit := fit_id(value, engine)) != value:
            data[field] = fit
            changed.append(field)
    for field, limit in _NAME_FIELDS.items():
        value = data.get(field)
        if isinstance(value, str) and (fit := fit_name(value, limit)) != value:
            data[field] = fit
            changed.append(field)
    return result, changed


def _valid(text: str) -> str:
    """Return ``text`` as plain text without NUL and lone surrogates."""
    valid = str.__str__(text).replace("\0", REPLACEMENT)
    try:
        valid.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", REPLACEMENT, valid)
    return valid


def _remember(shown: str, source: str) -> str:
    known = _originals.pop(shown, source)  # added again as the newest
    if len(_originals) >= MAX_ORIGINALS:
        try:
            _originals.pop(next(iter(_originals)), None)
        except RuntimeError:  # another thread has just remembered a text
            pass
    _originals[shown] = source if known == source and len(source) <= MAX_ORIGINAL_CHARS else None
    return shown


def _looks_changed(text: str) -> bool:
    return (
        REPLACEMENT in text
        or len(text) in (MAX_NAME_CHARS, MAX_TASK_NAME_CHARS)
        or (len(text) >= SHORT_ID_CHARS and _is_short_id(text) is not None)
    )
