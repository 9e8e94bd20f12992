"""What a task's author hides from monitors by ``argsrepr`` and ``kwargsrepr`` stays hidden.

A message carries its arguments and, for logs and monitors, a text of each. Celery makes the texts
itself unless the author gives others. So a text that says something else than the arguments is
what may be shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.saferepr import CUT, parse
from z4j_bare.events.snapshot import OpaqueStr, TypedStr, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

#: Characters and levels of Celery's own texts.
MAX_TEXT = 1024
MAX_LEVELS = 3

#: Lengths of texts that Celery may have cut, so that ``repr`` is not worth its time.
_MAY_BE_CUT = range(1000, 1200)


def shown_args(args: list[Any], text: object, is_sensitive_key: Callable[[str], bool]) -> list[Any]:
    """Return what may be shown of the positional arguments.

    :param args: a snapshot of them.
    :param text: ``argsrepr`` of their message.
    """
    if not args or not isinstance(text, str) or not text or _says_same(tuple(args), text):
        return args
    parsed = parse(text, is_sensitive_key)
    return parsed if isinstance(parsed, list) else [parsed]


def shown_kwargs(
    kwargs: dict[str, Any], text: object, is_sensitive_key: Callable[[str], bool]
) -> dict[str, Any]:
    """Return what may be shown of the keyword arguments; see :func:`shown_args`."""
    if not kwargs or not isinstance(text, str) or not text or _says_same(kwargs, text):
        return kwargs
    parsed = parse(text, is_sensitive_key)
    return parsed if isinstance(parsed, dict) else {"...": parsed}


def hides(value: object, text: object) -> bool:
    """Whether ``text`` says something else than the arguments ``value``.

    :param value: a snapshot.
    """
    if not value or not isinstance(text, str) or not text:
        return False
    return not _says_same(tuple(value) if isinstance(value, list) else value, text)


def carry_over(headers: dict[str, Any], body: object) -> None:
    """Give a message that a task sends under its own id the texts of the task's own message.

    ``Task.retry()`` sends the arguments without them. Texts that the task gives stay.

    :param headers: of the message; changed in place.
    :param body: ``(args, kwargs, embed)``.
    """
    from celery import current_task

    request = getattr(current_task, "request", None)
    if (
        request is None
        or headers.get("id") != request.id
        or headers.get("task") != current_task.name
        or not isinstance(body, tuple | list)
    ):
        return
    for field, own, sent in (
        ("argsrepr", list(request.args or ()), list(body[0])),
        ("kwargsrepr", dict(request.kwargs or {}), dict(body[1])),
    ):
        text = getattr(request, field, None)
        if hides(snapshot(own), text) and not hides(snapshot(sent), headers.get(field)):
            headers[field] = text


def _says_same(value: object, text: str) -> bool:
    # repr takes a tenth of the time of saferepr, and is equal for most arguments.
    if len(text) not in _MAY_BE_CUT and _inside(repr(value)) == _inside(text):
        return True
    from celery.utils.saferepr import saferepr

    return _inside(saferepr(value, MAX_TEXT, MAX_LEVELS)) == _inside(text) or _is_equal(
        list(value) if isinstance(value, tuple) else value, parse(text, _is_insensitive)
    )


def _inside(text: str) -> str:
    """Return a text without its brackets: arguments may be sent as a list or as a tuple."""
    return text[1:-1].rstrip(",")


def _is_insensitive(_key: str) -> bool:
    return False


def _is_equal(value: object, parsed: object) -> bool:
    """Whether a snapshot's value is the one that was parsed from a text.

    Tuples are lists there, and keys are text, as after JSON.
    """
    if isinstance(value, dict):
        return (
            isinstance(parsed, dict)
            and len(value) == len(parsed)
            and all(key in parsed and _is_equal(value[key], parsed[key]) for key in value)
        )
    if isinstance(value, list):
        if not value:
            return parsed in ([], {}, "set()", "frozenset()")
        return (
            isinstance(parsed, list)
            and len(value) == len(parsed)
            and all(map(_is_equal, value, parsed))
        )
    if isinstance(value, OpaqueStr):  # shows only a class
        return parsed != CUT
    if isinstance(value, TypedStr):
        return value.described == parsed
    if isinstance(value, float):
        return repr(value) == (repr(parsed) if isinstance(parsed, float) else parsed)
    return type(value) is type(parsed) and value == parsed
