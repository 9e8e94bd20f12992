"""The in-flight window."""

import itertools

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


def test_events_wait_for_ack_however_late():
    """No events are admitted behind a frame in flight, because the brain may still process it."""
    win = window.Window()
    win.sent("a", (1,), 50, 1.0)
    assert all(win.available(second) == 0 for second in range(1, 80))
    win.acked("a", 80.0)
    assert win.available(80.0 + window.ACK_PAUSE) > 0


def test_late_ack_makes_probes_due_at_growing_intervals():
    """An empty frame is due 2.5 s after a frame without an ack; four are due within 15 s."""
    win, probes = window.Window(), []
    assert not win.probe_due(100)
    win.sent("a", (1,), 50, 100)
    assert win.next_check(100) == window.PROBE_DELAY_INITIAL
    for now in (100 + tenth / 10 for tenth in range(600)):
        if win.probe_due(now):
            win.sent(f"probe {now}", (), 0, now)
            probes.append(now - 100)
    assert probes[0] == pytest.approx(window.PROBE_DELAY_INITIAL)
    assert sum(each < 15 for each in probes) == 4
    assert max(b - a for a, b in itertools.pairwise(probes)) < (window.PROBE_DELAY_MAX + 0.2)
    assert win.frames == 1 + len(probes)


def test_ack_of_probe_proves_skip():
    """The ack of an empty frame marks earlier frames as skipped; they are due within 5 s of it."""
    win = window.Window()
    win.sent("a", (1, 2), 2, 0)
    win.sent("probe", (), 0, 2.5)
    assert not win.resend_due(100)
    assert win.acked("probe", 3) == ()
    assert (len(win.skipped), win.in_flight, win.events) == (1, 0, 2)
    assert not win.resend_due(3.1), "the ack of a skipped frame may be late by a moment"
    assert 0 < win.next_check(3) < 5
    assert win.resend_due(3 + win.next_check(3))


def test_ack_of_frame_ends_wait_for_probe():
    """If the frame is acknowledged after all, nothing is skipped and no probe is due."""
    win = window.Window()
    win.sent("a", (1,), 2, 0)
    win.sent("probe", (), 0, 2.5)
    assert win.acked("a", 4) == (1,)
    win.acked("probe", 4.1)
    assert not win.skipped
    assert not win.probe_due(100)
    assert not win.resend_due(100)


@pytest.mark.parametrize("random", [lambda: 0.0, lambda: 0.999999], ids=["low", "high"])
def test_resend_delay_grows_and_stays_below_five_seconds(random):
    """While the brain skips each frame, the delay doubles, and it never exceeds 5 s."""
    win, delays = window.Window(random=random), []
    for number in range(8):
        now = number * 100
        win.sent(f"a{number}", (1,), 50, now)
        win.sent(f"b{number}", (), 0, now + 3)
        win.acked(f"b{number}", now + 4)
        delays.append(win.next_check(now + 4))
        win.reset()
    assert delays[0] < delays[1] < delays[2] == delays[7] < 5
    win.sent("c", (1,), 50, 1000)
    win.acked("c", 1001)
    win.sent("d", (1,), 50, 1002)
    win.sent("e", (), 0, 1003)
    win.acked("e", 1004)
    assert win.next_check(1004) == pytest.approx(delays[0])


def test_agents_resend_at_different_times():
    """The delays of fifty agents whose frames were skipped at the same time are spread."""
    delays = []
    for _ in range(50):
        win = window.Window()
        win.sent("a", (1,), 50, 0)
        win.sent("b", (), 0, 3)
        win.acked("b", 4)
        delays.append(win.next_check(4))
    assert max(delays) - min(delays) > window.RESEND_DELAY_INITIAL / 2


def test_skip_halves_frame_size_below_that_of_slow_acks():
    """Each skipped full frame halves the size, down to ten; quick acks raise it again."""
    win, sizes = window.Window(), []
    for number in range(4):
        win.sent(f"a{number}", (1,), win.frame_events, number * 10)
        win.sent(f"b{number}", (), 0, number * 10 + 3)
        win.acked(f"b{number}", number * 10 + 4)
        win.reset()
        sizes.append(win.frame_events)
    assert sizes == [25, 12, 10, 10]
    win.sent("slow", (1,), 10, 100)
    win.acked("slow", 102.9)
    assert win.frame_events == 10, "a slow ack does not raise the size"
    for number in range(8):
        win.sent(f"c{number}", (1,), win.frame_events, 200 + number)
        win.acked(f"c{number}", 200.1 + number)
    assert win.frame_events == window.FRAME_EVENTS_MAX


def test_skip_of_small_frame_keeps_frame_size():
    """A skipped frame that is far smaller than the frame size does not change that size."""
    win = window.Window()
    win.sent("a", (1,), 1, 0)
    win.sent("probe", (), 0, 3)
    win.acked("probe", 10)
    assert win.frame_events == window.FRAME_EVENTS_INITIAL


def test_ack_timeout_counts_from_last_ack():
    """Acks of any frame postpone the timeout, however old the oldest frame is."""
    win = window.Window()
    win.sent("a", (1,), 1, 0)
    win.sent("b", (2,), 1, 0)
    win.acked("a", 80)
    assert not win.ack_timed_out(100)
    assert win.ack_timed_out(171)


def test_no_event_overtakes_skipped_frame():
    """While a frame is skipped no events are admitted, also without pacing. Its late ack counts."""
    win = window.Window()
    win.sent("skipped", (1, 2), 2, 0)
    win.sent("next", (3,), 1, 1)
    assert win.acked("next", 2) == (3,)
    assert (win.available(60), win.limit) == (0, 1000)
    assert (win.events, win.frames) == (2, 1), "a skipped frame is still unacknowledged"
    win.disable_pacing()
    assert win.available(60) == 0
    assert win.resend_due(2), "a stopping agent does not wait"
    assert win.acked("skipped", 61) == (1, 2)
    assert (win.events, win.frames) == (0, 0)
    assert win.available(62) == 1000
    assert not win.resend_due(62)


def test_early_ack_proves_skip():
    """The ack of a later frame proves a skip also if it arrives before ``sent`` was called."""
    win = window.Window()
    win.sent("skipped", (1,), 1, 0)
    win.acked("next", 10)
    assert win.sent("next", (2,), 1, 10) == (2,)
    assert win.resend_due(15)
    win.reset()
    assert not win.resend_due(100)


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


class ScriptedBrain:
    """Processes the frames of one connection in order, and skips some of them without an ack.

    ``script`` has an entry for each frame: the seconds of its processing, and whether it is
    skipped. All later frames take 0.1 s and are acknowledged.
    """

    def __init__(self, script):
        self.attempts = {}
        self._script = iter(script)
        self._free_at = 0.0
        self._acks = []
        self._received = 0

    def receive(self, win, ids, now):
        """Receive the next frame of ``win``."""
        self._received += 1
        win.sent(str(self._received), ids, len(ids), now)
        seconds, skipped = next(self._script, (0.1, False))
        self._free_at = max(self._free_at, now) + seconds
        for row in ids:
            self.attempts.setdefault(row, []).append((now, self._free_at, skipped))
        if not skipped:
            self._acks.append((self._free_at, str(self._received)))

    def acks(self, now):
        """Return the frames that were acknowledged since the last call."""
        ready = [frame for at, frame in self._acks if at <= now]
        self._acks = [(at, frame) for at, frame in self._acks if at > now]
        return ready


@given(
    st.lists(st.tuples(st.floats(0.01, 20.0), st.booleans()), max_size=40),
    st.integers(1, 12),
    st.floats(0, 0.999),
)
def test_skipped_rows_are_sent_again_in_time_and_never_while_under_way(script, rows, random):
    """A row is sent again within 5 s of the proof, and only after the brain has skipped it."""
    win, brain = window.Window(random=lambda: random), ScriptedBrain(script)
    pending, done, now, proven_at = list(range(rows)), [], 0.0, None
    while len(done) < rows:
        now += 0.1
        assert now < 3000
        for frame in brain.acks(now):
            done += win.acked(frame, now)
        if win.skipped and proven_at is None:
            proven_at = now
        if win.resend_due(now) and not win.has_rows_in_flight():
            assert now - proven_at < 5
            proven_at = None
            win.skipped.clear()
            pending = sorted({*range(rows)}.difference(done))
        if win.probe_due(now):
            brain.receive(win, (), now)
        if pending and win.available(now):
            brain.receive(win, (pending.pop(0),), now)
    assert done == list(range(rows)), "each once, and in order"
    for attempts in brain.attempts.values():
        for (_, finished, skipped), (again, _, _) in itertools.pairwise(attempts):
            assert skipped
            assert again >= finished


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
