"""The in-flight window."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.wire import window


def test_window_admits_one_frame_and_pauses_after_ack():
    """A frame in flight leaves no capacity. Its ack returns the row ids, and a pause follows."""
    w = window.Window()
    assert w.available(0) == 1000
    assert w.sent("a", (1, 2), 2, 0) == ()
    assert (w.available(0), w.events, w.frames) == (0, 2, 1)
    assert w.acked("a", 0.1) == (1, 2)
    assert (w.available(0.1), w.pause_remaining(0.1), w.frames) == (
        0,
        pytest.approx(window.ACK_PAUSE),
        0,
    )
    assert (w.available(0.1 + window.ACK_PAUSE), w.pause_remaining(0.1 + window.ACK_PAUSE)) == (
        1000,
        0,
    )


def test_disabled_pacing_admits_events_despite_frame_and_pause():
    """Without pacing there is capacity while a frame is in flight and right after an ack."""
    w = window.Window()
    w.disable_pacing()
    w.sent("a", (1, 2), 2, 0)
    assert w.available(0.1) == 998
    w.acked("a", 0.2)
    assert w.available(0.2) == 1000


def test_early_ack_is_matched_by_later_send():
    """An ack that arrives before ``sent`` was called for its frame is not lost."""
    w = window.Window()
    assert w.acked("a", 0) == ()
    assert w.sent("a", (7,), 1, 0) == (7,)
    assert w.frames == 0


def test_early_acks_are_bounded():
    """Acks of unknown frames do not accumulate."""
    w = window.Window()
    for number in range(5000):
        w.acked(str(number), 0)
    assert w.sent("0", (1,), 1, 0) == ()
    assert w.sent("4999", (2,), 1, 0) == (2,)


def test_limit_halves_on_slow_acks_and_grows_on_fast_acks():
    """The limit halves when a frame is older than 2.5 s, and doubles after an ack within 1 s."""
    w = window.Window()
    w.sent("slow", (1,), 1, 0)
    w.available(6)
    assert w.limit == 500
    w.available(7)
    assert w.limit == 500, "once per 5 s, not once per look"
    w.available(12)
    assert w.limit == 250
    w.acked("slow", 13)
    assert w.limit == 250, "a late ack is no reason to grow"
    w.sent("fast", (2,), 1, 14)
    w.acked("fast", 14.2)
    assert w.limit == 500


def test_frame_size_follows_brain_time_per_frame():
    """Frames start small, grow while the brain is fast, and shrink when it is too slow."""
    w, sizes = window.Window(), []
    for number in range(6):
        sizes.append(w.frame_events)
        w.sent(str(number), (number,), w.frame_events, number)
        w.acked(str(number), number + 0.2)
    assert sizes == [50, 100, 200, 400, 500, 500]
    w.sent("slow", (9,), 500, 10)
    w.sent("behind it", (10,), 250, 10)
    w.acked("slow", 10 + 2 * window.TARGET_FRAME_SECONDS)
    assert w.frame_events == 250
    w.acked("behind it", 10.5 + 2 * window.TARGET_FRAME_SECONDS)
    assert w.frame_events == 500, (
        "it took half a second of the brain's time, and waited for the rest"
    )
    w.sent("slow again", (11,), 500, 20)
    w.acked("slow again", 20 + 1.25 * window.TARGET_FRAME_SECONDS)
    assert w.frame_events == 400, "what takes as long as it should, by what this one took"
    for number in range(10):
        w.sent(f"slow {number}", (number,), 50, 20 + number * 10)
        w.acked(f"slow {number}", 25 + number * 10)
    assert w.frame_events == window.FRAME_FIRST


def test_small_frames_do_not_grow_frame_size():
    """Single events that are acknowledged at once do not make frames larger."""
    w = window.Window()
    for number in range(20):
        w.sent(str(number), (number,), 1, number)
        w.acked(str(number), number + 0.01)
    assert w.frame_events == window.FRAME_FIRST


def test_limit_stays_at_minimum_without_acks():
    """Without any ack the limit falls to its minimum and not below."""
    w = window.Window()
    w.sent("x", (1,), 1, 0)
    for second in range(0, 600, 6):
        w.available(second)
    assert w.limit == window.MIN_EVENTS


def test_second_frame_waits_for_ack_or_slow_ack():
    """A second frame waits for the first one's ack, or until that may have been skipped."""
    w = window.Window()
    w.sent("a", (1,), 50, 1.0)
    assert w.available(1.0 + window.SLOW_ACK - 0.1) == 0
    assert w.available(1.0 + window.SLOW_ACK + 0.1) > 0
    w.sent("b", (2,), 50, 4.0)
    assert w.available(4.0 + window.SLOW_ACK - 0.1) == 0
    w.acked("b", 5.0)
    assert w.available(5.0 + window.ACK_PAUSE) > 0, "what was left behind keeps nobody waiting"


def test_ack_timeout_counts_from_last_ack():
    """Acks of any frame postpone the timeout, however old the oldest frame is."""
    w = window.Window()
    w.sent("a", (1,), 1, 0)
    w.sent("b", (2,), 1, 0)
    w.acked("b", 80)
    assert not w.ack_timed_out(100)
    assert w.ack_timed_out(171)


def test_skipped_frame_takes_no_capacity():
    """A skipped frame neither lowers the limit nor uses capacity. Its late ack still counts."""
    w = window.Window()
    w.sent("skipped", (1, 2), 2, 0)
    w.sent("next", (3,), 1, 1)
    assert w.acked("next", 2) == (3,)
    assert (w.available(60), w.limit) == (1000, 1000)
    assert (w.events, w.frames) == (2, 1), "it is not delivered all the same"
    assert w.acked("skipped", 61) == (1, 2)
    assert (w.events, w.frames) == (0, 0)


def test_skipped_frame_times_out_despite_other_acks():
    """Acks of later frames do not postpone the resend of a skipped frame, even early acks."""
    w = window.Window()
    w.sent("skipped", (1,), 1, 0)
    w.acked("next", 10)
    w.sent("next", (2,), 1, 10)
    for second in range(11, 100):
        w.sent(str(second), (second,), 1, second)
        w.acked(str(second), second)
        assert not w.ack_timed_out(second)
    assert w.ack_timed_out(101)
    w.reset()
    assert not w.ack_timed_out(102)


def test_ack_timeout_needs_frame_in_flight():
    """An idle session does not time out, and the time counts from its next frame."""
    w = window.Window()
    assert not w.ack_timed_out(1000)
    w.sent("a", (1,), 1, 1000)
    assert not w.ack_timed_out(1001)


def test_reset_removes_unacked_frames():
    """After a reset nothing is in flight, and an ack of an earlier frame returns no rows."""
    w = window.Window()
    w.sent("a", (1,), 1, 0)
    w.reset()
    assert (w.frames, w.events) == (0, 0)
    assert w.acked("a", 1) == ()


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(1, 500)), max_size=60)
)
def test_event_count_equals_frames_in_flight(steps):
    """For any order of frames and acks, the count equals the events that are in flight."""
    w, flying = window.Window(), {}
    for now, (name, is_ack, size) in enumerate(steps):
        if is_ack:
            w.acked(name, now)
            flying.pop(name, None)
        elif name not in flying and not w.sent(name, (1,), size, now):
            flying[name] = size
    assert w.events == sum(flying.values())
