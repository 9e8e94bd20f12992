"""Stamps, tracks, kinds and encoding: what the brain needs to put events in order."""

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


def encoder():
    return Encoder("celery", Redactor(RedactionEngine()))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_stamps_never_go_back(clock):
    """Whatever the clock does, a task's stamps do not regress: the brain refuses an older one."""
    task_state = TaskState(TaskType("a", None), None)
    stamps = [task_state.next_timestamp(now, "task.received") for now in clock]
    assert stamps == sorted(stamps)


def test_second_event_of_a_kind_gets_its_own_second():
    """Two retries within one second get different whole seconds, because the brain drops the second of a pair."""
    task_state = TaskState(TaskType("a", None), None)
    stamps = [task_state.next_timestamp(100.2, "task.retried") for _ in range(3)]
    assert [int(stamp) for stamp in stamps] == [100, 101, 102]


def test_stamps_do_not_run_away():
    """However many events of a kind come in one second, stamps stay within five seconds of the clock."""
    task_state = TaskState(TaskType("a", None), None)
    assert max(task_state.next_timestamp(100.0, "task.retried") for _ in range(50)) <= 100.0 + MAX_TIMESTAMP_LEAD


def test_different_kinds_share_a_second():
    """Received and started in one second are no pair."""
    task_state = TaskState(TaskType("a", None), None)
    assert (
        int(task_state.next_timestamp(100.2, "task.received"))
        == int(task_state.next_timestamp(100.3, "task.started"))
        == 100
    )


def test_tracks_are_bounded():
    """Tasks that leave for another worker and never come back do not pile up."""
    task_states = TaskStates()
    for number in range(MAX_TASKS + 10):
        task_states.add(str(number), TaskState(TaskType("a", None), None))
    assert len(task_states) == MAX_TASKS
    assert task_states.get("0") is None
    assert task_states.end(str(MAX_TASKS)) is not None


def test_kinds_read_annotations_once():
    """A task's @z4j_meta is read at its first event and its fields go into every one."""
    asked = []
    kinds = TaskTypes(
        lambda task: (
            asked.append(task) or TaskMeta(tags=("billing",), priority="high", deadline_ms=5)
        )
    )
    task = SimpleNamespace(name="shop.pay")
    assert kinds.of(task) is kinds.of(task)
    assert kinds.of(task).fields == {
        "task_name": "shop.pay",
        "tags": ["billing"],
        "priority": "high",
        "deadline_ms": 5,
    }
    assert len(asked) == 1


def test_skip_and_sample_rate():
    """Skipped tasks are not reported; a sampled one is reported for that share of ids, always the same ones."""
    assert not TaskType("a", TaskMeta(skip=True)).is_sampled("x")
    kind = TaskType("a", TaskMeta(sample_rate=0.25))
    chosen = [number for number in range(4000) if kind.is_sampled(str(number))]
    assert 800 < len(chosen) < 1200
    assert chosen == [number for number in range(4000) if kind.is_sampled(str(number))]


def test_ids_are_uuids_of_version_4():
    """Event ids are valid for the brain, and different."""
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
def test_encoded_events_are_canonical(task_id, stamp, kwargs):
    """The hand-assembled envelope is the canonical JSON of what it says."""
    encoded = encoder()(
        (None, "task.received", stamp, task_id, {"task_name": "a"}, {"kwargs": kwargs})
    )
    assert canonical_plain(json.loads(encoded)) == encoded
    assert json.loads(encoded)["task_id"] == task_id


def test_times_are_utc_with_microseconds():
    """A stamp becomes ISO 8601 in UTC; also when the second changes and comes back."""
    make = encoder()
    times = [
        json.loads(make((None, "task.started", stamp, "t", {}, {})))["occurred_at"]
        for stamp in (0.25, 61.000001, 0.5)
    ]
    assert times == [
        "1970-01-01T00:00:00.250000+00:00",
        "1970-01-01T00:01:01.000001+00:00",
        "1970-01-01T00:00:00.500000+00:00",
    ]


def test_unencodable_text_is_made_plain():
    """A lone surrogate or NaN in a task's data costs its own characters, not the event."""
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
    assert data["task_id"] == "t?"


def own(meta, **data):
    return json.loads(encoder()((None, "task.received", 1.0, "t", {}, {**data, "_meta": meta})))[
        "data"
    ]


def test_kept_kwargs():
    """keep_kwargs keeps those, drops others, and hides the positions, which have no names."""
    assert own(TaskMeta(keep_kwargs=frozenset({"a"})), args=[1], kwargs={"a": 1, "b": 2}) == {
        "args": "[REDACTED]",
        "kwargs": {"a": 1},
    }


def test_redacted_kwargs_and_result():
    """redact_kwargs and redact_result hide what they name, whatever the default rules think of it."""
    data = own(
        TaskMeta(redact_kwargs=frozenset({"b"}), redact_result=True),
        kwargs={"a": 1, "b": 2},
        result=3,
    )
    assert data == {"kwargs": {"a": 1, "b": "[REDACTED]"}, "result": "[REDACTED]"}


def test_long_tracebacks_are_cut_after_redaction():
    """A traceback is cut to what the adapter's own hooks send, with their mark."""
    data = json.loads(
        encoder()((None, "task.failed", 1.0, "t", {}, {"traceback": "line\n" * 1020}))
    )["data"]
    assert data["traceback"].endswith("[... traceback truncated ...]")
    assert len(data["traceback"]) < 4200


def test_only_names_that_redaction_swallows_are_rewritten():
    """An FQDN worker name gets underscores in its host part; any other name stays as it is."""
    matches = RedactionEngine().value_matches
    assert safe_name("celery@web-1.example.com", matches) == "celery@web-1_example_com"
    assert safe_name("celery@web-1", matches) == "celery@web-1"
    assert not matches(safe_name("celery@web-1.example.com", matches))


def test_presence_announces_each_worker_once():
    """A worker seen again is no news; an announcement names every worker known."""
    got = []
    presence = Presence(
        "celery",
        lambda item: got.append(json.loads(item[0](item))),
        RedactionEngine().value_matches,
        clock=lambda: 1.5,
    )
    presence.online("w@a.example.com")
    presence.online("w@a.example.com")
    presence.announce("worker.offline")
    assert [(event["kind"], event["data"]["worker"]) for event in got] == [
        ("worker.online", "w@a_example_com"),
        ("worker.offline", "w@a_example_com"),
    ]
    assert got[0]["occurred_at"] == "1970-01-01T00:00:01.500000+00:00"


def test_presence_forgets():
    """A worker that left is told once, one that fell silent is not told; neither is announced again."""
    got = []
    presence = Presence(
        "celery",
        lambda record: got.append((record[1], record[-1]["worker"])),
        RedactionEngine().value_matches,
    )
    left, silent = presence.online("left@a.example.com"), presence.online("silent@a")
    presence.remove(left, announce=True)
    presence.remove(left, announce=True)
    presence.remove(silent, announce=False)
    presence.announce("worker.heartbeat")
    assert got == [("worker.online", left), ("worker.online", silent), ("worker.offline", left)]


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
def test_what_is_spliced_is_what_the_encoder_makes(task, call, above, outcome):
    """The three events of a task, spliced from text, are the bytes that the encoder makes of the same fields."""
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
    written = [
        task_encoder.received((None, 5.0, "t", task_state, args, kwargs, *above)),
        task_encoder.started((None, 5.1, "t", task_state)),
        task_encoder.succeeded((None, 5.2, "t", task_state, 1.5, *outcome[:2])),
    ]
    for bytes_, stamp, (kind, fields) in zip(written, (5.0, 5.1, 5.2), expected, strict=True):
        assert without_id(bytes_) == without_id(
            plain((None, kind, stamp, "t", task_state.task_type.fields, fields))
        )
        assert canonical_plain(json.loads(bytes_)) == bytes_


def without_id(event):
    return {**json.loads(event), "id": ""}


def test_notes_are_stamped_in_the_order_of_the_ring():
    """Whatever is written up later, a note that is stamped at once has its time before those that others stamp meanwhile."""
    task_state, task_encoder = (
        TaskState(TaskType("a", None), "q"),
        TaskEncoder("celery", Redactor(RedactionEngine()), "w"),
    )
    note = task_encoder.stamped_now((task_encoder.received, 10.0, "t", task_state, None, None, None, None))
    assert task_state.next_timestamp(10.5, "task.started") == 10.5
    assert json.loads(note[0](note))["occurred_at"].endswith("00:00:10.000000+00:00")
    other = (task_encoder.started, 11.0, "t", task_state)
    assert task_encoder.stamped_now(other) is other
