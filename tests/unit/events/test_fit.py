"""Every event fits the columns of the brain's database, whoever builds it and from whatever."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from z4j_celery import CeleryEngineAdapter
from z4j_celery.meta import TaskMeta
from z4j_core.models import Event
from z4j_core.models.event import EventKind
from z4j_core.redaction.engine import RedactionEngine

from tests.support.celery_fakes import memory_app
from z4j_bare.engines.celery.capture import CeleryCapture
from z4j_bare.engines.celery.task_encoder import TaskEncoder
from z4j_bare.engines.celery.task_state import TaskState, TaskType
from z4j_bare.engines.celery.translate import Translator
from z4j_bare.events.encode import Encoder, encode_model
from z4j_bare.events.presence import Presence
from z4j_bare.events.redaction import Redactor
from z4j_bare.wire import fit
from z4j_bare.wire.canonical import canonical_plain

#: Maximum characters of the brain's columns, by the field of the event.
COLUMNS = {
    "task_id": 193,
    "parent_task_id": 193,
    "root_task_id": 193,
    "task_name": 500,
    "queue": 200,
    "worker": 200,
}

#: The task of :func:`by_signals`.
REGISTERED = "celery.backend_cleanup"


class Facts(SimpleNamespace):
    """The odd texts of one task: ids, names, and a value with a key."""

    @property
    def names(self):
        """The names by field of the event."""
        return {"task_name": self.name, "queue": self.queue, "worker": self.worker}

    @property
    def above(self):
        """The ids by field of the event's data."""
        return {"parent_task_id": self.parent, "root_task_id": self.root}

    @property
    def kwargs(self):
        """Keyword arguments."""
        return {self.key: self.value, "nested": [{self.key: [self.value]}]}


def redactor():
    return Redactor(RedactionEngine())


def by_task_encoder(facts, meta=None):
    """The three spliced events and a failure."""
    encoder = TaskEncoder("celery", redactor(), facts.worker)
    state = TaskState(TaskType(facts.name, meta), facts.queue)
    own = {"exception": "ValueError", "exception_message": facts.value, "traceback": facts.value}
    args = [facts.value]
    return [
        encoder.received(
            (None, 5.0, facts.id, state, args, facts.kwargs, facts.parent, facts.root, None)
        ),
        encoder.received((None, 5.0, facts.id, state, None, None, None, facts.root, None)),
        encoder.started((None, 6.0, facts.id, state)),
        encoder.succeeded((None, 7.0, facts.id, state, 1.5, True, facts.kwargs)),
        encoder.generic((None, 8.0, facts.id, state, "task.failed", own, 1.5)),
    ]


def by_task_encoder_with_meta(facts):
    """The same for a task with ``@z4j_meta``."""
    return by_task_encoder(facts, TaskMeta(tags=(facts.value,)))


def by_encoder(facts):
    """An event of ``Encoder``, and one that contains a value that JSON cannot hold."""
    data = {**facts.names, **facts.above, "kwargs": facts.kwargs}
    return [
        Encoder("celery", redactor())((None, "task.received", 1.0, facts.id, {}, each))
        for each in (data, {**data, "args": [float("nan")]})
    ]


def by_model(facts):
    """An event of an adapter's own stream."""
    data = {**facts.names, **facts.above, "kwargs": facts.kwargs, "result": {1: facts.value}}
    event = Event.model_construct(
        id=UUID(int=4),
        engine="celery",
        task_id=facts.id,
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data=data,
    )
    return [encode_model((None, event))]


def by_presence(facts):
    """The announcement of a worker."""
    records = []
    Presence("celery", records.append, lambda _: False).online(facts.worker)
    return [record[0](record) for record in records]


def by_translator(facts):
    """Events from the broker."""
    records = []
    workers = SimpleNamespace(touch=lambda _: facts.worker, queue_of=lambda *_: facts.queue)
    adapter = SimpleNamespace(
        celery_app=SimpleNamespace(tasks={}), redaction=RedactionEngine(), name="celery"
    )
    translate = Translator(adapter, records.append, workers)
    common = {"hostname": facts.worker, "uuid": facts.id, "timestamp": 1.0}
    text = repr(facts.value)
    received = {"name": facts.name, "args": f"({text},)", "kwargs": f"{{{facts.key!r}: {text}}}"}
    translate(
        {
            "type": "task-received",
            **common,
            **received,
            "parent_id": facts.parent,
            "root_id": facts.root,
        }
    )
    translate({"type": "task-failed", **common, "exception": facts.value, "traceback": facts.value})
    return [record[0](record) for record in records]


def by_signals(facts):
    """The events of the signal handlers."""
    records = []
    with memory_app() as app:
        task = app.tasks[REGISTERED]
        capture = CeleryCapture(CeleryEngineAdapter(celery_app=app), records.append, facts.worker)
        request = SimpleNamespace(
            id=facts.id,
            task=task,
            args=[facts.value],
            kwargs=facts.kwargs,
            parent_id=facts.parent,
            root_id=facts.root,
            delivery_info={"routing_key": facts.queue},
            retries=0,
            request_dict={},
            argsrepr=None,
            kwargsrepr=None,
        )
        capture._on_received(request=request)
        capture._on_prerun(task_id=facts.id, task=task)
        capture._on_retry(sender=task, request=request, reason=facts.value)
        capture._on_failure(sender=task, task_id=facts.id, exception=ValueError(facts.value))
        capture._on_unknown(name=facts.name, id=facts.id)
        return [record[0](record) for record in records]


BUILDERS = (
    by_task_encoder,
    by_task_encoder_with_meta,
    by_encoder,
    by_model,
    by_presence,
    by_translator,
    by_signals,
)

odd_text = st.text(st.characters() | st.just("\0"), max_size=6)
long_text = st.builds(
    lambda text, number: (text * number)[:700], odd_text.filter(bool), st.integers(1, 700)
)
some_text = (odd_text | long_text).filter(bool)
facts_of_tasks = st.builds(
    Facts,
    id=some_text,
    parent=some_text | st.none(),
    root=some_text | st.none(),
    name=some_text,
    queue=some_text,
    worker=some_text,
    key=odd_text,
    value=some_text,
)
ODD = Facts(
    id="i" * 250,
    parent="p\0",
    root="r" * 194,
    name="n" * 501,
    queue="q" * 300,
    worker="w" * 201,
    key="k\0y",
    value="a\0b\\u0000",
)


@pytest.mark.parametrize("build", BUILDERS)
@given(facts=facts_of_tasks)
@example(facts=ODD)
def test_every_event_fits_brain_database(build, facts):
    """An event contains no NUL and no text that is too long, and lists exactly what was changed."""
    fit._originals.clear()
    before = fit.fitted.copy()
    events = build(facts)
    assert events
    marks = [violations_checked(encoded, facts) for encoded in events]
    counted = fit.fitted - before
    assert counted.total() == sum(map(len, marks))


def violations_checked(encoded, facts):
    """Assert the rule for one event, and return its list of changed parts."""
    event = json.loads(encoded)
    assert canonical_plain(event) == encoded
    assert not any("\0" in text for text in texts(event))
    data = event["data"]
    marks = data.get(fit.MARK, [])
    shown = {**data, "task_id": event["task_id"]}
    originals = {**facts.names, **facts.above, "task_id": facts.id}
    for field, limit in COLUMNS.items():
        text = shown.get(field)
        if text is None:
            continue
        assert len(text) <= limit, field
        if field in marks:
            assert originals[field] != text
            # None if two fields were cut to the same text.
            assert fit.original(text) in (originals[field], None)
        elif text not in ("", REGISTERED):
            assert text == originals[field]
    assert len(marks) == len(set(marks))
    return marks


def texts(value):
    """Yield all keys and strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)


def test_fitting_event_is_not_marked():
    """An event without NUL and with short texts stays as it is, also with an escape for NUL."""
    facts = Facts(
        id="i" * 193,
        parent="p",
        root="r",
        name="n" * 500,
        queue="q" * 200,
        worker="w" * 200,
        key="k",
        value="\\u0000 \\\\u0000",
    )
    for build in (by_task_encoder, by_encoder, by_model, by_presence):
        for encoded in build(facts):
            data = json.loads(encoded)["data"]
            assert fit.MARK not in data
            assert facts.value in data.get("kwargs", {"k": facts.value}).values()


def test_changed_event_lists_its_parts():
    """The mark names the changed ids and names, and NUL anywhere else."""
    event = json.loads(by_model(ODD)[0])
    assert event["data"][fit.MARK] == [
        "task_id",
        "parent_task_id",
        "root_task_id",
        "task_name",
        "queue",
        "worker",
        "nul",
    ]
    assert event["data"]["kwargs"]["k\ufffdy"] == "a\ufffdb\\u0000"
    assert event["data"]["queue"] == "q" * 200
    assert event["data"]["parent_task_id"] == "p\ufffd"
