"""Task states, task types and encoders: the order and the content of events."""

import json
from types import SimpleNamespace
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st
from z4j_celery.meta import TaskMeta
from z4j_core.redaction.engine import RedactionEngine

from z4j_bare.engines.celery.task_encoder import TaskEncoder
from z4j_bare.engines.celery.task_state import (
    MAX_TASKS,
    MAX_TIMESTAMP_LEAD,
    TaskState,
    TaskStates,
    TaskType,
    TaskTypes,
)
from z4j_bare.events.encode import Encoder, new_ids
from z4j_bare.events.presence import Presence
from z4j_bare.events.redaction import Redactor, safe_name
from z4j_bare.wire.canonical import canonical_plain
from z4j_bare.wire.fit import fit_id


def encoder():
    return Encoder("celery", Redactor(RedactionEngine()))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_timestamps_never_decrease(clock):
    """A task's timestamps do not decrease, because the brain rejects an older one."""
    task_state = TaskState(TaskType("a", None), None)
    timestamps = [task_state.next_timestamp(now, "task.received") for now in clock]
    assert timestamps == sorted(timestamps)


def test_repeated_kind_gets_its_own_second():
    """Two retries within a second get different whole seconds, because the brain drops one of a
    pair.
    """
    task_state = TaskState(TaskType("a", None), None)
    timestamps = [task_state.next_timestamp(100.2, "task.retried") for _ in range(3)]
    assert [int(timestamp) for timestamp in timestamps] == [100, 101, 102]


def test_timestamps_lead_clock_by_bounded_time():
    """Timestamps of many events of a kind stay within five seconds of the clock."""
    task_state = TaskState(TaskType("a", None), None)
    assert (
        max(task_state.next_timestamp(100.0, "task.retried") for _ in range(50))
        <= 100.0 + MAX_TIMESTAMP_LEAD
    )


def test_different_kinds_share_a_second():
    """Received and started may have the same second."""
    task_state = TaskState(TaskType("a", None), None)
    assert (
        int(task_state.next_timestamp(100.2, "task.received"))
        == int(task_state.next_timestamp(100.3, "task.started"))
        == 100
    )


def test_task_states_are_bounded():
    """States of tasks that continue in another worker are evicted."""
    task_states = TaskStates()
    for number in range(MAX_TASKS + 10):
        task_states.add(str(number), TaskState(TaskType("a", None), None))
    assert len(task_states) == MAX_TASKS
    assert task_states.get("0") is None
    assert task_states.end(str(MAX_TASKS)) is not None


def test_task_types_read_meta_once():
    """A task's ``@z4j_meta`` is read at its first event, and its fields are in every event."""
    read = []
    task_types = TaskTypes(
        lambda task: (
            read.append(task) or TaskMeta(tags=("billing",), priority="high", deadline_ms=5)
        )
    )
    task = SimpleNamespace(name="shop.pay")
    assert task_types.of(task) is task_types.of(task)
    assert task_types.of(task).fields == {
        "task_name": "shop.pay",
        "tags": ["billing"],
        "priority": "high",
        "deadline_ms": 5,
    }
    assert len(read) == 1


def test_sampling_selects_share_of_ids():
    """Skipped tasks are not sampled; a rate selects that share of ids, and always the same ones."""
    assert not TaskType("a", TaskMeta(skip=True)).is_sampled("x")
    task_type = TaskType("a", TaskMeta(sample_rate=0.25))
    chosen = [number for number in range(4000) if task_type.is_sampled(str(number))]
    assert 800 < len(chosen) < 1200
    assert chosen == [number for number in range(4000) if task_type.is_sampled(str(number))]


def test_ids_are_unique_uuids_of_version_4():
    """Event ids are different, and valid for the brain."""
    new_id = new_ids()
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {UUID(each).version for each in ids} == {4}


@given(
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.floats(1e9, 2e9),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5),
        st.integers() | st.text(st.characters(codec="utf-8"), max_size=9),
        max_size=5,
    ),
)
def test_encoder_output_is_canonical(task_id, stamp, kwargs):
    """The assembled envelope is the canonical JSON of its content."""
    encoded = encoder()(
        (None, "task.received", stamp, task_id, {"task_name": "a"}, {"kwargs": kwargs})
    )
    assert canonical_plain(json.loads(encoded)) == encoded
    assert json.loads(encoded)["task_id"] == fit_id(task_id, "celery")


def test_encoder_writes_utc_with_microseconds():
    """A timestamp becomes ISO 8601 in UTC, also when the second changes back."""
    encode = encoder()
    times = [
        json.loads(encode((None, "task.started", timestamp, "t", {}, {})))["occurred_at"]
        for timestamp in (0.25, 61.000001, 0.5)
    ]
    assert times == [
        "1970-01-01T00:00:00.250000+00:00",
        "1970-01-01T00:01:01.000001+00:00",
        "1970-01-01T00:00:00.500000+00:00",
    ]


def test_encoder_replaces_unencodable_text():
    """A lone surrogate or NaN costs its own characters, not the event."""
    data = json.loads(
        encoder()(
            (
                None,
                "task.received",
                1.0,
                "t\ud800",
                {},
                {"kwargs": {"a": "\ud800", "b": float("nan")}},
            )
        )
    )
    assert data["data"]["kwargs"] == {"a": "?", "b": "nan"}
    assert data["task_id"] == "t\ufffd"


def data_with(meta, **data):
    return json.loads(encoder()((None, "task.received", 1.0, "t", {}, {**data, "_meta": meta})))[
        "data"
    ]


def test_keep_kwargs_drops_others():
    """``keep_kwargs`` keeps those, drops others, and redacts positional arguments, which have no
    names.
    """
    assert data_with(TaskMeta(keep_kwargs=frozenset({"a"})), args=[1], kwargs={"a": 1, "b": 2}) == {
        "args": "[REDACTED]",
        "kwargs": {"a": 1},
    }


def test_task_meta_redacts_kwargs_and_result():
    """``redact_kwargs`` and ``redact_result`` redact what the default rules would keep."""
    data = data_with(
        TaskMeta(redact_kwargs=frozenset({"b"}), redact_result=True),
        kwargs={"a": 1, "b": 2},
        result=3,
    )
    assert data == {"kwargs": {"a": 1, "b": "[REDACTED]"}, "result": "[REDACTED]"}


def test_encoder_truncates_long_traceback():
    """A traceback is truncated like that of the adapter's own hooks, with their marker."""
    data = json.loads(
        encoder()((None, "task.failed", 1.0, "t", {}, {"traceback": "line\n" * 1020}))
    )["data"]
    assert data["traceback"].endswith("[... traceback truncated ...]")
    assert len(data["traceback"]) < 4200


def test_safe_name_rewrites_only_redacted_names():
    """A fully qualified host name gets underscores; any other name stays unchanged."""
    matches = RedactionEngine().value_matches
    assert safe_name("celery@web-1.example.com", matches) == "celery@web-1_example_com"
    assert safe_name("celery@web-1", matches) == "celery@web-1"
    assert not matches(safe_name("celery@web-1.example.com", matches))


def test_presence_announces_each_worker_once():
    """A known worker is not announced again, and an announcement names every known worker."""
    recorded = []
    presence = Presence(
        "celery",
        lambda item: recorded.append(json.loads(item[0](item))),
        RedactionEngine().value_matches,
        clock=lambda: 1.5,
    )
    presence.online("w@a.example.com")
    presence.online("w@a.example.com")
    presence.announce("worker.offline")
    assert [(event["kind"], event["data"]["worker"]) for event in recorded] == [
        ("worker.online", "w@a_example_com"),
        ("worker.offline", "w@a_example_com"),
    ]
    assert recorded[0]["occurred_at"] == "1970-01-01T00:00:01.500000+00:00"


def test_presence_removes_workers():
    """A removed worker is announced as offline at most once, and only on request."""
    recorded = []
    presence = Presence(
        "celery",
        lambda record: recorded.append((record[1], record[-1]["worker"])),
        RedactionEngine().value_matches,
    )
    offline, silent = presence.online("offline@a.example.com"), presence.online("silent@a")
    presence.remove(offline, announce=True)
    presence.remove(offline, announce=True)
    presence.remove(silent, announce=False)
    presence.announce("worker.heartbeat")
    assert recorded == [
        ("worker.online", offline),
        ("worker.online", silent),
        ("worker.offline", offline),
    ]


names = st.text(st.characters(codec="utf-8"), max_size=9)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
ids = st.none() | names | st.just("\ud800")
metas = st.sampled_from(
    [
        None,
        TaskMeta(tags=("a", "b"), priority="high"),
        TaskMeta(redact_result=True, keep_kwargs=frozenset({"a"})),
    ]
)


@given(
    task=st.tuples(names, st.none() | names | st.just("\udfff"), metas, st.none() | names),
    call=st.tuples(
        st.lists(anything, max_size=3),
        st.dictionaries(names | st.just("password"), anything, max_size=3),
    )
    | st.none(),
    above=st.tuples(ids, ids),
    outcome=st.tuples(st.booleans(), anything | st.just(float("nan")), st.booleans()),
)
def test_spliced_events_equal_encoded_events(task, call, above, outcome):
    """The three spliced events of a task equal those of the encoder for the same fields."""
    name, queue, meta, worker = task
    task_state, redactor = TaskState(TaskType(name, meta), queue), Redactor(RedactionEngine())
    task_encoder, plain = TaskEncoder("celery", redactor, worker), Encoder("celery", redactor)
    task_state.started_at = 1.0 if outcome[2] else 0.0
    own = {"worker": worker, "queue": queue} | ({} if meta is None else {"_meta": meta})
    expected = [
        ("task.received", own | ({} if call is None else {"args": call[0], "kwargs": call[1]})),
        ("task.started", {"worker": worker, "queue": queue}),
        (
            "task.succeeded",
            own
            | ({"result": outcome[1]} if outcome[0] else {})
            | ({"runtime_ms": 500} if outcome[2] else {}),
        ),
    ]
    expected[0][1].update(
        {
            key: each
            for key, each in zip(("parent_task_id", "root_task_id"), above, strict=True)
            if each
        }
    )
    args, kwargs = call or (None, None)
    encoded = [
        task_encoder.received((None, 5.0, "t", task_state, args, kwargs, *above, None)),
        task_encoder.started((None, 5.1, "t", task_state)),
        task_encoder.succeeded((None, 5.2, "t", task_state, 1.5, *outcome[:2])),
    ]
    for spliced, timestamp, (kind, fields) in zip(encoded, (5.0, 5.1, 5.2), expected, strict=True):
        assert without_id(spliced) == without_id(
            plain((None, kind, timestamp, "t", task_state.task_type.fields, fields))
        )
        assert canonical_plain(json.loads(spliced)) == spliced


def without_id(event):
    return {**json.loads(event), "id": ""}
