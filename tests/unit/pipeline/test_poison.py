"""Which rows are tried apart, and what the log may say of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.buffer.rows import EVENT, RESULT, BufferEntry
from z4j_bare.pipeline.poison import SPLIT_FACTOR, SUSPECT_AFTER, describe, next_trial


def rows(*attempts, kind=EVENT, payload=b"{}"):
    return [
        BufferEntry(number, kind, f"k-{number}", payload, 0.0, count)
        for number, count in enumerate(attempts)
    ]


def test_clear_rows_are_sent_normally():
    """A row that was in flight in one failed session is not a suspect."""
    results, events = rows(0, 1, kind=RESULT), rows(1, 0, 1)
    assert next_trial(results, events) == (results, events, [])


def test_suspect_blocks_later_events():
    """Only events before the first suspect are sent with others."""
    events = rows(0, 1, *[SUSPECT_AFTER] * 16, 0)
    assert next_trial([], events) == ([], events[:2], events[2:4])


def test_suspected_result_is_tried_alone_and_first():
    """A suspected result is tried alone, before any event."""
    results, events = rows(0, 2, 2, kind=RESULT), rows(2, 2)
    assert next_trial(results, events) == (results[:1], [], results[1:2])


@given(st.lists(st.integers(0, 9), max_size=40))
def test_trial_is_part_of_first_equal_set(attempts):
    """The trial is an eighth of the first set of equal counts, and at least one row."""
    events = rows(*attempts)
    _, calm, suspected = next_trial([], events)
    assert events[len(calm) :][: len(suspected)] == suspected
    if len(calm) < len(events):
        alike = next(
            (
                index
                for index, each in enumerate(events[len(calm) :])
                if each.attempts != suspected[0].attempts
            ),
            len(events) - len(calm),
        )
        assert len(suspected) == -(-alike // SPLIT_FACTOR)
    assert all(each.attempts < SUSPECT_AFTER for each in calm)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (
            b'{"kind":"task.failed","engine":"rq","task_id":"t\\n1","data":{"x":"secret"}}',
            "a 'task.failed' of 'rq', task 't\\n1', 75 bytes",
        ),
        (b'{"kind":["x"]}', """a "['x']" of 'None', task 'None', 14 bytes"""),
        (b"[1]", "a row that is not an event, 3 bytes"),
        (b"\xff\xfe", "a row that is not an event, 2 bytes"),
        (b"[" * 100_000, "a row that is not an event, 100000 bytes"),
    ],
)
def test_description_contains_no_event_data(payload, said):
    """A row is described by kind, engine, task and size only, whatever its payload is."""
    assert describe(rows(0, payload=payload)[0]) == said
    assert (
        describe(rows(0, kind=RESULT, payload=payload)[0])
        == f"the result of command k-0, {len(payload)} bytes"
    )
