"""The in-flight window."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.wire import window


def test_window_admits_one_frame_and_pauses_after_ack():
    """A frame in flight leaves no capacity. Its ack returns the row ids, and a pause follows."""
    win = window.Window()
    assert win.available(0) == 1000
    assert win.sent("a", (1, 2), 2, 0) == ()
    assert (win.available(0), win.events, win.frames) == (0, 2, 1)
    assert win.acked("a", 0.1) == (1, 2)
    assert (win.available(0.1), win.pause_remaining(0.1), win.frames) == (
        0,
        pytest.approx(window.ACK_PAUSE),
        0,
    )
    assert (win.available(0.1 + window.ACK_PAUSE), win.pause_remaining(0.1 + window.ACK_PAUSE)) == (
        1000,
        0,
    )


def test_disabled_pacing_admits_events_despite_frame_and_pause():
    """Without pacing there is capacity while a frame is in flight and right after an ack."""
    win = window.Window()
    win.disable_pacing()
    win.sent("a", (1, 2), 2, 0)
    assert win.available(0.1) == 998
    win.acked("a", 0.2)
    assert win.available(0.2) == 1000


def test_early_ack_is_matched_by_later_send():
    """An ack that arrives before ``sent`` was called for its frame is not lost."""
    win = window.Window()
    assert win.acked("a", 0) == ()
    assert win.sent("a", (7,), 1, 0) == (7,)
    assert win.frames == 0


def test_early_acks_are_bounded():
    """Acks of unknown frames do not accumulate."""
    win = window.Window()
    for number in range(5000):
        win.acked(str(number), 0)
    assert win.sent("0", (1,), 1, 0) == ()
    assert win.sent("4999", (2,), 1, 0) == (2,)


def test_limit_halves_on_slow_acks_and_grows_on_fast_acks():
    """The limit halves when a frame is older than 2.5 s, and doubles after an ack within 1 s."""
    win = window.Window()
    win.sent("slow", (1,), 1, 0)
    win.available(6)
    assert win.limit == 500
    win.available(7)
    assert win.limit == 500, "halved once per SLOW_ACK, not once per call"
    win.available(12)
    assert win.limit == 250
    win.acked("slow", 13)
    assert win.limit == 250, "a late ack does not raise the limit"
    win.sent("fast", (2,), 1, 14)
    win.acked("fast", 14.2)
    assert win.limit == 500


def test_frame_size_follows_brain_time_per_frame():
    """Frames start small, grow while the brain is fast, and shrink when it is too slow."""
    win, sizes = window.Window(), []
    for number in range(6):
        sizes.append(win.frame_events)
        win.sent(str(number), (number,), win.frame_events, number)
        win.acked(str(number), number + 0.2)
    assert sizes == [50, 100, 200, 400, 500, 500]
    win.sent("slow", (9,), 500, 10)
    win.sent("behind it", (10,), 250, 10)
    win.acked("slow", 10 + 2 * window.TARGET_FRAME_SECONDS)
    assert win.frame_events == 250
    win.acked("behind it", 10.5 + 2 * window.TARGET_FRAME_SECONDS)
    assert win.frame_events == 500, (
        "its own time was 0.5 s; before that it waited for the slow frame"
    )
    win.sent("slow again", (11,), 500, 20)
    win.acked("slow again", 20 + 1.25 * window.TARGET_FRAME_SECONDS)
    assert win.frame_events == 400, "the size follows the time of this frame"
    for number in range(10):
        win.sent(f"slow {number}", (number,), 50, 20 + number * 10)
        win.acked(f"slow {number}", 25 + number * 10)
    assert win.frame_events == window.FRAME_EVENTS_INITIAL


def test_small_frames_do_not_grow_frame_size():
    """Single events that are acknowledged at once do not make frames larger."""
    win = window.Window()
    for number in range(20):
        win.sent(str(number), (number,), 1, number)
        win.acked(str(number), number + 0.01)
    assert win.frame_events == window.FRAME_EVENTS_INITIAL


def test_limit_stays_at_minimum_without_acks():
    """Without any ack the limit falls to its minimum and not below."""
    win = window.Window()
    win.sent("x", (1,), 1, 0)
    for second in range(0, 600, 6):
        win.available(second)
    assert win.limit == window.MIN_EVENTS


def test_second_frame_waits_for_ack_or_slow_ack():
    """A second frame waits for the first one's ack, or until that may have been skipped."""
    win = window.Window()
    win.sent("a", (1,), 50, 1.0)
    assert win.available(1.0 + window.SLOW_ACK - 0.1) == 0
    assert win.available(1.0 + window.SLOW_ACK + 0.1) > 0
    win.sent("b", (2,), 50, 4.0)
    assert win.available(4.0 + window.SLOW_ACK - 0.1) == 0
    win.acked("b", 5.0)
    assert win.available(5.0 + window.ACK_PAUSE) > 0, "a skipped frame delays no other"


def test_ack_timeout_counts_from_last_ack():
    """Acks of any frame postpone the timeout, however old the oldest frame is."""
    win = window.Window()
    win.sent("a", (1,), 1, 0)
    win.sent("b", (2,), 1, 0)
    win.acked("b", 80)
    assert not win.ack_timed_out(100)
    assert win.ack_timed_out(171)


def test_skipped_frame_takes_no_capacity():
    """A skipped frame neither lowers the limit nor uses capacity. Its late ack still counts."""
    win = window.Window()
    win.sent("skipped", (1, 2), 2, 0)
    win.sent("next", (3,), 1, 1)
    assert win.acked("next", 2) == (3,)
    assert (win.available(60), win.limit) == (1000, 1000)
    assert (win.events, win.frames) == (2, 1), "a skipped frame is still unacknowledged"
    assert win.acked("skipped", 61) == (1, 2)
    assert (win.events, win.frames) == (0, 0)


def test_skipped_frame_times_out_despite_other_acks():
    """Acks of later frames do not postpone the resend of a skipped frame, even early acks."""
    win = window.Window()
    win.sent("skipped", (1,), 1, 0)
    win.acked("next", 10)
    win.sent("next", (2,), 1, 10)
    for second in range(11, 100):
        win.sent(str(second), (second,), 1, second)
        win.acked(str(second), second)
        assert not win.ack_timed_out(second)
    assert win.ack_timed_out(101)
    win.reset()
    assert not win.ack_timed_out(102)


def test_ack_timeout_needs_frame_in_flight():
    """An idle session does not time out, and the time counts from its next frame."""
    win = window.Window()
    assert not win.ack_timed_out(1000)
    win.sent("a", (1,), 1, 1000)
    assert not win.ack_timed_out(1001)


def test_reset_removes_unacked_frames():
    """After a reset nothing is in flight, and an ack of an earlier frame returns no rows."""
    win = window.Window()
    win.sent("a", (1,), 1, 0)
    win.reset()
    assert (win.frames, win.events) == (0, 0)
    assert win.acked("a", 1) == ()


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(1, 500)), max_size=60)
)
def test_event_count_equals_frames_in_flight(steps):
    """For any order of frames and acks, the count equals the events that are in flight."""
    win, expected = window.Window(), {}
    for now, (name, is_ack, size) in enumerate(steps):
        if is_ack:
            win.acked(name, now)
            expected.pop(name, None)
        elif name not in expected and not win.sent(name, (1,), size, now):
            expected[name] = size
    assert win.events == sum(expected.values())
