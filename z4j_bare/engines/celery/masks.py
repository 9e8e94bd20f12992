"""Keeps arguments out of events if the task's author hides them by ``argsrepr`` or ``kwargsrepr``.

A message contains the arguments and, for logs and monitors, their texts ``argsrepr`` and
``kwargsrepr``. If a text differs from the arguments, the author has replaced the text to hide the
arguments. In this case only the text is reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from z4j_bare.engines.celery.saferepr import CUT, parse
from z4j_bare.events.snapshot import OpaqueStr, TypedStr, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

#: Maximum characters of the texts that Celery makes.
MAX_TEXT = 1024
#: Maximum nesting levels of these texts.
MAX_LEVELS = 3

#: Lengths, in characters, of texts that Celery may have cut.
#: Such a text is not compared with the result of ``repr``, because ``repr`` never cuts a text.
_MAY_BE_CUT = range(1000, 1200)


def shown_args(args: list[Any], text: object, is_sensitive_key: Callable[[str], bool]) -> list[Any]:
    """Return ``args``, or the parsed ``text`` if the text differs from ``args``.

    :param args: a snapshot of the positional arguments.
    :param text: ``argsrepr`` of the message that carries the arguments.
    """
    if not hides(args, text):
        return args
    parsed = parse(str(text), is_sensitive_key)
    return parsed if isinstance(parsed, list) else [parsed]


def shown_kwargs(
    kwargs: dict[str, Any], text: object, is_sensitive_key: Callable[[str], bool]
) -> dict[str, Any]:
    """Return ``kwargs``, or the parsed ``text`` if the text differs; see :func:`shown_args`."""
    if not hides(kwargs, text):
        return kwargs
    parsed = parse(str(text), is_sensitive_key)
    return parsed if isinstance(parsed, dict) else {"...": parsed}


def hides(value: object, text: object) -> bool:
    """Whether ``text`` differs from the arguments ``value``.

    :param value: a snapshot of the arguments.
    :param text: ``argsrepr`` or ``kwargsrepr``. ``None`` hides nothing. An author may set an empty
        text, or a value that is not text.
    """
    if not value or text is None:
        return False
    return not _says_same(tuple(value) if isinstance(value, list) else value, str(text))


def carry_over(headers: dict[str, Any], body: object) -> None:
    """Copy the author's ``argsrepr`` and ``kwargsrepr`` to a message that continues the task.

    ``Task.retry()`` and ``Task.replace()`` omit these texts. The message of a replacement gets a
    text only if the replacement has the same arguments as the replaced task.
    If the task has set a text in the new message, that text is kept.

    :param headers: the headers of the new message; changed in place.
    :param body: the body of the new message, ``(args, kwargs, embed)``.
    """
    from celery import current_task

    request = getattr(current_task, "request", None)
    if request is None or headers.get("id") != request.id or not isinstance(body, tuple | list):
        return
    is_replacement = headers.get("task") != current_task.name
    for field, own, sent in (
        ("argsrepr", list(request.args or ()), list(body[0])),
        ("kwargsrepr", dict(request.kwargs or {}), dict(body[1])),
    ):
        text = getattr(request, field, None)
        if (
            hides(snapshot(own), text)
            and not hides(snapshot(sent), headers.get(field))
            and not (is_replacement and snapshot(sent) != snapshot(own))
        ):
            headers[field] = text


def _says_same(value: object, text: str) -> bool:
    # repr takes a tenth of the time of saferepr, and gives the same text for most arguments.
    if len(text) not in _MAY_BE_CUT and _inside(repr(value)) == _inside(text):
        return True
    from celery.utils.saferepr import saferepr

    return _inside(saferepr(value, MAX_TEXT, MAX_LEVELS)) == _inside(text) or _is_equal(
        list(value) if isinstance(value, tuple) else value, parse(text, _is_insensitive)
    )


def _inside(text: str) -> str:
    """Return ``text`` without its brackets, which differ between a list and a tuple."""
    return text[1:-1].rstrip(",")


def _is_insensitive(_key: str) -> bool:
    return False


def _is_equal(value: object, parsed: object) -> bool:
    """Whether ``value``, from a snapshot, equals ``parsed``, which was parsed from a text.

    Both values have JSON types: tuples are lists, and keys are texts.
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
    if isinstance(value, OpaqueStr):  # the value is unknown, so any text is accepted
        return parsed != CUT
    if isinstance(value, TypedStr):
        return value.described == parsed
    if isinstance(value, float):
        return repr(value) == (repr(parsed) if isinstance(parsed, float) else parsed)
    return type(value) is type(parsed) and value == parsed
