"""Rows, frames and digests, compared with z4j_core's definitions for any schedules."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from z4j_core.redaction.engine import RedactionConfig, RedactionEngine

from tests.support.streams import StreamBrain, schedule
from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import Redactor
from z4j_bare.schedules import projection
from z4j_bare.schedules.host import MAX_ROW_TEXT_BYTES
from z4j_bare.schedules.projection import Authority

REDACTOR = Redactor(RedactionEngine(RedactionConfig(max_value_bytes=MAX_ROW_TEXT_BYTES)))

#: Names and texts, some of which the brain would redact.
SECRETS = st.sampled_from(
    [
        "a@example.com",
        "token",
        "password",
        "postgres://u:p@h/db",
        "x" * 9000,
        "[REDACTED]",
        '"schedules":[',
        "\u2028é",
    ]
)
TEXTS = st.one_of(st.text(max_size=20), SECRETS)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
NAMES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30),
    st.just("for a@example.com"),
).filter(str.strip)


def row(each):
    return projection.make_row(each, "beat", REDACTOR)


def activated():
    brain = StreamBrain()
    return brain, Authority.from_parameters(brain.grant(), "beat")


def publish(brain, authority, rows, sequence=1):
    events = [
        json.loads(event)
        for event in projection.snapshot(
            authority, sequence, projection.sort_rows(rows), "test", lambda: None
        )
    ]
    for event in events:
        brain.receive_event(event)
    return events


@settings(max_examples=60)
@given(
    st.dictionaries(
        NAMES.map(str.strip),
        st.tuples(st.lists(VALUES, max_size=3), st.dictionaries(TEXTS, VALUES, max_size=3)),
        max_size=5,
    )
)
def test_snapshot_of_any_schedules_is_accepted(wanted):
    """The brain accepts any names and arguments, and each schedule has its own key."""
    brain, authority = activated()
    rows = [
        row(schedule(name).model_copy(update={"args": args, "kwargs": kwargs}))
        for name, (args, kwargs) in wanted.items()
    ]
    publish(brain, authority, rows)
    assert len(brain.rows) == len(wanted)
    assert brain.published_reasons == ["test"]


@settings(max_examples=30)
@given(NAMES, st.lists(VALUES, max_size=3))
def test_control_projection_has_core_digest(name, args):
    """The row of a control projection has the digest that z4j_core computes."""
    brain, authority = activated()
    known = row(schedule(name).model_copy(update={"args": args}))
    publish(brain, authority, [known])
    brain.receive_event(
        json.loads(projection.control(authority, 2, known, "operation", "external-control"))
    )
    assert brain.sequence == 2


def test_large_snapshot_is_split_into_bounded_frames(monkeypatch):
    """Rows are split into bounded frames, ordered by key, followed by one terminal frame."""
    brain, authority = activated()
    rows = [row(schedule(f"n{number}", kwargs={"filler": "x" * 900})) for number in range(300)]
    events = publish(brain, authority, rows)
    frames = [event["data"]["external_snapshot_frame"] for event in events]
    assert [frame["frame_kind"] for frame in frames] == ["rows"] * (len(frames) - 1) + ["terminal"]
    assert len(frames) > 4
    assert max(len(json.dumps(event)) for event in events) < 128 * 1024
    assert len(brain.rows) == 300


def test_empty_snapshot_is_one_terminal_frame():
    """An empty snapshot is one terminal frame, which deletes all schedules."""
    brain, authority = activated()
    (event,) = publish(brain, authority, [])
    assert event["data"]["external_snapshot_frame"]["frame_count"] == 0


def test_row_is_redacted_and_keeps_unique_key():
    """Secrets in arguments are redacted, and a digest replaces a name with a secret."""
    found = row(schedule("for a@example.com", external_id=None, kwargs={"api_key": "k", "x": 1}))
    assert found.fields["kwargs"] == {"api_key": "[REDACTED]", "x": 1}
    assert found.key == found.fields["name"]
    assert found.key.startswith("redacted-")
    assert found.adapter_key == "for a@example.com"
    assert found.source["kwargs"] == {"api_key": "k", "x": 1}
    assert b"example.com" not in found.encoded


def test_foreign_objects_in_arguments_become_text():
    """Objects that are not JSON become text and do not spoil the snapshot."""
    brain, authority = activated()
    foreign = schedule("foreign").model_copy(
        update={
            "args": [object, {1, 2}, float("nan")],
            "last_run_at": datetime(2026, 1, 1, tzinfo=UTC),
        }
    )
    publish(brain, authority, [row(foreign)])
    assert brain.rows["id:foreign"]["args"] == ["<class 'object'>", [1, 2], "nan"]
    assert brain.rows["id:foreign"]["last_run_at"] == "2026-01-01T00:00:00.000000+00:00"


def test_unpublishable_rows_raise_value_error():
    """Two schedules with one key, a row that is too large and a foreign object are errors."""
    with pytest.raises(ValueError, match="two schedules have the key id:a"):
        projection.sort_rows([row(schedule("a")), row(schedule("b")), row(schedule("a"))])
    with pytest.raises(ValueError, match="over the limit"):
        row(schedule("large", args=["x" * 7000] * 100))
    with pytest.raises(ValueError, match="int is not a schedule"):
        row(3)


@pytest.mark.parametrize(
    "changes",
    [
        {"stream_id": ""},
        {"epoch_uuid": None},
        {"epoch_number": 0},
        {"epoch_number": True},
        {"epoch_number": "1"},
        {"adapter_instance_id": 3},
        {"source_scope": "{}"},
    ],
)
def test_invalid_authority_is_rejected(changes):
    """Parameters without a valid stream, epoch or scope are rejected."""
    with pytest.raises(CommandError):
        Authority.from_parameters({**StreamBrain().grant(), **changes}, "beat")
