"""What ``argsrepr`` and ``kwargsrepr`` hide is not shown, and other arguments are shown in full."""

import datetime as dt
import decimal
import json
import uuid

import pytest
from celery.app.trace import trace_task
from celery.signals import before_task_publish
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st
from z4j_celery import CeleryEngineAdapter

from tests.support.celery_fakes import memory_app, task_request
from z4j_bare.engines.celery.capture import CeleryCapture
from z4j_bare.engines.celery.masks import shown_args, shown_kwargs
from z4j_bare.events.snapshot import snapshot

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.decimals(allow_nan=False)
    | st.datetimes(timezones=st.none() | st.just(dt.UTC))
    | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


def is_sensitive(key):
    return key == "password"


def after_json(value):
    """What a worker receives: tuples are lists, and keys are text."""
    if isinstance(value, dict):
        return {str(key): after_json(item) for key, item in value.items()}
    return list(map(after_json, value)) if isinstance(value, list | tuple) else value


class Card:
    """A class of the host."""

    def __repr__(self):
        return "Card('4929')"


def test_masked_arguments_show_text():
    """The texts of the message are shown instead of the arguments, parsed if possible."""
    args = ["4929-1234", "Alice: flu"]
    assert shown_args(args, "(<hidden>, <hidden>)", is_sensitive) == ["<hidden>", "<hidden>"]
    assert shown_args(args, "hidden", is_sensitive) == ["hidden"]
    assert shown_args(args, "('4929-1234', '***')", is_sensitive) == ["4929-1234", "***"]
    assert shown_args(args, "('4929...', 'Alice...')", is_sensitive) == ["4929...", "Alice..."]
    assert shown_args(args, "(...)", is_sensitive) == ["[... cut]"]
    kwargs = {"card": "1234 5678", "password": "hunter2"}
    masked = repr({"card": "****", "password": "hunter2"})
    assert shown_kwargs(kwargs, masked, is_sensitive)["card"] == "****"
    assert shown_kwargs(kwargs, "card=****", is_sensitive) == {"...": "card=****"}


HIDDEN = [49, 4.9, True, decimal.Decimal("4.9"), dt.date(2026, 1, 2), uuid.UUID(int=1), {"a": 1}]


@pytest.mark.parametrize(
    ("text", "args", "kwargs"),
    [("", [""], {"...": ""}), (["<hidden>"], ["<hidden>"], {"...": ["<hidden>"]})],
)
def test_empty_text_and_other_types_mask(text, args, kwargs):
    """An empty text hides the arguments, and so does a value that is no text."""
    assert shown_args(["secret"], text, lambda _key: False) == args
    assert shown_kwargs({"a": "secret"}, text, lambda _key: False) == kwargs
    assert shown_args(["shown"], None, lambda _key: False) == ["shown"]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_value_of_any_type_is_masked(hidden):
    """Values of types that are shown as text are masked, too, alone and inside of containers."""
    for value, text in (([hidden], "(<hidden>,)"), ([[hidden, 1]], "([<hidden>, 1],)")):
        shown = shown_args(snapshot(value), text, is_sensitive)
        assert str(hidden) not in str(shown)
        assert "hidden" in str(shown)


@given(st.lists(VALUES, max_size=3), st.dictionaries(st.text(max_size=4), VALUES, max_size=3))
def test_celerys_own_text_masks_nothing(args, kwargs):
    """Arguments with the text that Celery makes of them are shown as they are."""
    received_args, received_kwargs = snapshot(after_json(args)), snapshot(after_json(kwargs))
    for text in (saferepr(tuple(args)), saferepr(args), repr(tuple(args))):
        if len(text) < 900 and "..." not in text and not {"\\", '"'} & set(text):
            assert shown_args(received_args, text, is_sensitive) is received_args
    text = saferepr(kwargs)
    if len(text) < 900 and "..." not in text and not {"\\", '"'} & set(text):
        assert shown_kwargs(received_kwargs, text, is_sensitive) is received_kwargs


def test_cut_text_masks_nothing():
    """A text that Celery has cut because of its length or its depth does not cut the arguments."""
    for args in (
        ["x" * 9000],
        list(range(400)),
        [{"a": [[[[1]]]]}],
        [{"n": list(range(300))}, "b"],
    ):
        text = saferepr(tuple(args), 1024)
        received = snapshot(args)
        assert shown_args(received, text, is_sensitive) is received


def test_objects_show_their_class_only():
    """The ``repr`` of a host's object, which Celery's text contains, is not shown."""
    received = snapshot([Card(), 1])
    assert shown_args(received, saferepr((Card(), 1)), is_sensitive) is received
    assert "4929" not in str(received)


def captured(app, **texts):
    """The data of the event of a task that is received with these texts."""
    events = []
    capture = CeleryCapture(
        CeleryEngineAdapter(celery_app=app), lambda record: events.append(record[0](record)), "w@h"
    )
    request = task_request(app, "celery.backend_cleanup", args=("4929",), kwargs={"card": "1234"})
    for name, text in texts.items():
        setattr(request, name, text)
    capture._on_received(request=request)
    return json.loads(events[0])["data"]


def test_capture_masks_arguments():
    """The event of a masked task has the masked arguments only."""
    with memory_app() as app:
        data = captured(app, argsrepr="(<hidden>,)", kwargsrepr="{'card': '****'}")
        assert (data["args"], data["kwargs"]) == (["<hidden>"], {"card": "****"})
        plain = captured(app)
        assert (plain["args"], plain["kwargs"]) == (["4929"], {"card": "1234"})


@pytest.mark.parametrize("own", [None, "(own,)"])
def test_retry_keeps_masks(own):
    """``Task.retry()`` sends the texts of the task's own message, unless it gives others."""
    sent = []

    def keep(headers, **_kwargs):
        sent.append((headers["argsrepr"], headers["kwargsrepr"]))

    with memory_app() as app:

        @app.task(shared=False, name="shop.retry", bind=True)
        def retry(self, number, card):
            options = {} if own is None else {"argsrepr": own}
            raise self.retry(countdown=0, **options)

        capture = CeleryCapture(CeleryEngineAdapter(celery_app=app), lambda _: None, "w@h")
        capture.connect()
        before_task_publish.connect(keep)
        try:
            masks = {"argsrepr": "(<hidden>,)", "kwargsrepr": "{'card': '****'}"}
            for fields in (masks, {"argsrepr": "('4929',)", "kwargsrepr": "{'card': '1234'}"}):
                request = {"id": "t1", "delivery_info": {}, "retries": 0, **fields}
                trace_task(retry, "t1", ["4929"], {"card": "1234"}, request, app=app)
            app.send_task("shop.other", args=("4929",), task_id="t2")
        finally:
            before_task_publish.disconnect(keep)
            capture.disconnect()
    first = "(own,)" if own else "(<hidden>,)"
    second = "(own,)" if own else "['4929']"
    assert sent[0] == (first, "{'card': '****'}")
    assert sent[1][1] == "{'card': '1234'}"
    assert sent[1][0] in {second, "('4929',)"}
    assert sent[2][0] == "('4929',)"


@pytest.mark.parametrize(
    ("args", "texts"),
    [(("4929",), ("(<hidden>,)", "{'card': '****'}")), (("other",), ("('other',)", "{}"))],
    ids=["same", "other"],
)
def test_replacement_with_same_arguments_keeps_masks(args, texts):
    """If the arguments are the same, ``Task.replace()`` sends the texts of the replaced task."""
    sent = []

    def keep(headers, **_kwargs):
        sent.append((headers["argsrepr"], headers["kwargsrepr"]))

    with memory_app() as app:

        @app.task(shared=False, name="shop.final")
        def final(*_args, **_kwargs):
            pass

        @app.task(shared=False, name="shop.first", bind=True)
        def first(self, *_args, **kwargs):
            raise self.replace(final.s(*args, **(kwargs if args == ("4929",) else {})))

        capture = CeleryCapture(CeleryEngineAdapter(celery_app=app), lambda _: None, "w@h")
        capture.connect()
        before_task_publish.connect(keep)
        try:
            request = {"id": "t1", "delivery_info": {}, "argsrepr": "(<hidden>,)"}
            request["kwargsrepr"] = "{'card': '****'}"
            trace_task(first, "t1", ["4929"], {"card": "1234"}, request, app=app)
        finally:
            before_task_publish.disconnect(keep)
            capture.disconnect()
    assert sent == [texts]
