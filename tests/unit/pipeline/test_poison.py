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


def test_calm_rows_go_as_they_are():
    """What went down with one session at most is no suspect."""
    results, events = rows(0, 1, kind=RESULT), rows(1, 0, 1)
    assert next_trial(results, events) == (results, events, [])


def test_a_suspect_holds_back_what_is_behind_it():
    """Only what stands in front of the first suspects is sent with others."""
    events = rows(0, 1, *[SUSPECT_AFTER] * 16, 0)
    assert next_trial([], events) == ([], events[:2], events[2:4])


def test_results_are_tried_one_by_one_and_first():
    """A suspected result is tried alone, before any event is."""
    results, events = rows(0, 2, 2, kind=RESULT), rows(2, 2)
    assert next_trial(results, events) == (results[:1], [], results[1:2])


@given(st.lists(st.integers(0, 9), max_size=40))
def test_sets_shrink_until_one_is_alone(attempts):
    """What is tried is the front of the first set of equal counts: an eighth, one at least, and never more than there is."""
    events = rows(*attempts)
    _, calm, suspects = next_trial([], events)
    assert events[len(calm) :][: len(suspects)] == suspects
    if len(calm) < len(events):
        alike = next(
            (
                index
                for index, each in enumerate(events[len(calm) :])
                if each.attempts != suspects[0].attempts
            ),
            len(events) - len(calm),
        )
        assert len(suspects) == -(-alike // SPLIT_FACTOR)
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
def test_what_the_log_says(payload, said):
    """A row is named by kind, engine, task and size, whatever it holds, and nothing else of it is said."""
    assert describe(rows(0, payload=payload)[0]) == said
    assert (
        describe(rows(0, kind=RESULT, payload=payload)[0])
        == f"the result of command k-0, {len(payload)} bytes"
    )
