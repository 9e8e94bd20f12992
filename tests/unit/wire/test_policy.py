"""Close codes, back-off and the in-flight window: decisions without a clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from z4j_bare.errors import (
    AuthenticationRejectedError,
    IncompatibleError,
    NetworkError,
    PoisonRowError,
    RemoteProtocolError,
    SessionLimitError,
)
from z4j_bare.wire import backoff, close_codes, window

#: Close code, exception, what its text names.
CLOSES = [
    (4401, AuthenticationRejectedError, "Z4J_TOKEN"),
    (4003, AuthenticationRejectedError, "revoked"),
    (4403, AuthenticationRejectedError, "Z4J_AGENT_IP_ALLOWLIST"),
    (4400, RemoteProtocolError, "frame"),
    (4426, IncompatibleError, "upgrade"),
    (4427, IncompatibleError, "upgrade"),
    (4002, SessionLimitError, "worker id"),
    (4408, NetworkError, "no frame"),
    (4429, SessionLimitError, "64 workers"),
    (1011, NetworkError, "failed"),
    (1012, NetworkError, "restarting"),
    (1001, NetworkError, "going away"),
    (1000, NetworkError, "closed"),
    (None, NetworkError, "lost"),
    (4999, NetworkError, "lost"),
]

STATUSES = [
    (400, NetworkError, "Z4J_ALLOWED_HOSTS"),
    (401, AuthenticationRejectedError, "Z4J_TOKEN"),
    (403, AuthenticationRejectedError, "archived"),
    (404, NetworkError, "Z4J_BRAIN_URL"),
    (409, NetworkError, "session"),
    (422, NetworkError, "HTTP 422"),
    (429, SessionLimitError, "600 requests"),
    (502, NetworkError, "HTTP 502"),
    (503, NetworkError, "no capacity"),
]


@pytest.mark.parametrize(("code", "kind", "named"), CLOSES)
def test_close_codes(code, kind, named):
    """Every close code of the contract has its class, and a text that names what to look at."""
    error = close_codes.error_for_close_code(code, "because")
    assert type(error) is kind
    assert named in str(error)
    assert "because" in str(error)
    assert error.code == code


@pytest.mark.parametrize(("status", "kind", "named"), STATUSES)
def test_http_statuses(status, kind, named):
    """HTTP refusals fall into the same classes, name what to look at, and a Retry-After is kept."""
    error = close_codes.error_for_http_status(status, "because", retry_after=7.0)
    assert type(error) is kind
    assert named in str(error)
    assert "because" in str(error)
    assert (error.code, error.retry_after) == (status, 7.0)


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        (75.0, "this host's clock is 75 s behind the brain's"),
        (-3600.4, "this host's clock is 3600 s ahead of the brain's"),
        (
            49.0,
            "Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE): the brain rejected a signature; the clocks differ by only 49 s",
        ),
        (None, "Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE): the brain rejected a signature"),
    ],
)
def test_a_refused_signature_means_the_clock_or_the_key(behind, said):
    """A signature refused after the welcome is blamed on the clock only when the brain's differs by as much."""
    for error in (
        close_codes.error_for_close_code(4403),
        AuthenticationRejectedError("the first upload", code=409),
    ):
        explained = close_codes.explain_signature_error(error, behind)
        assert said in str(explained)
        assert (type(explained), explained.code) == (AuthenticationRejectedError, error.code)
    ours = close_codes.explain_signature_error(
        RemoteProtocolError("the brain's frame failed verification: stale", code=4403), behind
    )
    assert ("clock is" in str(ours)) == ("clock is" in said), (
        "so with a frame of the brain that we refused"
    )
    revoked = close_codes.error_for_close_code(4003)
    assert close_codes.explain_signature_error(revoked, behind) is revoked


@pytest.mark.parametrize(
    ("error", "first", "longest"),
    [
        (NetworkError("x"), 1, 30),
        (RemoteProtocolError("x"), 1, 60),
        (AuthenticationRejectedError("x"), 10, 600),
        (IncompatibleError("x"), 120, 3600),
        (SessionLimitError("x"), 10, 600),
        (PoisonRowError("x"), 1, 4),
        (ValueError("x"), 1, 30),
    ],
)
def test_schedules(error, first, longest):
    """Each failure class doubles from its first delay to its longest."""
    back = backoff.ReconnectBackoff(random=lambda: 0.0)
    delays = [back.next(error) for _ in range(20)]
    assert delays[:2] == [first, min(first * 2, longest)]
    assert delays[-1] == longest


def test_jitter():
    """Chance adds up to 30 percent."""
    back = backoff.ReconnectBackoff(random=lambda: 1.0)
    assert back.next(NetworkError("x")) == pytest.approx(1.3)
    assert back.next(NetworkError("x")) == pytest.approx(2.6)


def test_only_a_steady_session_starts_over():
    """A session that dies young leaves the delays as they have grown; the streaks that are reported end with any."""
    back = backoff.ReconnectBackoff(random=lambda: 0.0)
    assert [back.next(NetworkError("x")), back.next(SessionLimitError("x"))] == [1, 10]
    assert back.on_connected() == {"connection": 2, "protocol": 0, "auth": 0}
    assert back.streaks == {"connection": 0, "protocol": 0, "auth": 0}
    back.on_session_end(29)
    assert [back.next(NetworkError("x")), back.next(SessionLimitError("x"))] == [2, 20]
    back.on_session_end(30)
    assert [back.next(NetworkError("x")), back.next(SessionLimitError("x"))] == [1, 40]
    back.on_session_end(1800)
    assert back.next(SessionLimitError("x")) == 10


def test_classes_do_not_share_a_ladder():
    """A flaky line does not lengthen the wait after an authentication failure."""
    back = backoff.ReconnectBackoff(random=lambda: 0.0)
    for _ in range(5):
        back.next(NetworkError("x"))
    assert back.next(AuthenticationRejectedError("x")) == 10


def test_the_servers_wish_counts():
    """Never sooner than Retry-After, but an absurd one is bounded."""
    back = backoff.ReconnectBackoff(random=lambda: 0.0)
    assert back.next(NetworkError("x", retry_after=17)) == 17
    assert back.next(NetworkError("x", retry_after=10**9)) == 3600


def test_window_counts_and_releases():
    """A frame on its way leaves no room; an ack gives its rows, and the room a breath later."""
    w = window.Window()
    assert w.available(0) == 1000
    assert w.sent("a", (1, 2), 2, 0) == ()
    assert (w.available(0), w.events, w.frames) == (0, 2, 1)
    assert w.acked("a", 0.1) == (1, 2)
    assert (w.available(0.1), w.pause_remaining(0.1), w.frames) == (0, pytest.approx(window.ACK_PAUSE), 0)
    assert (w.available(0.1 + window.ACK_PAUSE), w.pause_remaining(0.1 + window.ACK_PAUSE)) == (1000, 0)


def test_who_has_no_time_waits_for_nothing():
    """In a hurry there is room behind a frame that is on its way, and right after an ack."""
    w = window.Window()
    w.disable_pacing()
    w.sent("a", (1, 2), 2, 0)
    assert w.available(0.1) == 998
    w.acked("a", 0.2)
    assert w.available(0.2) == 1000


def test_early_acks():
    """An ack that arrives before its send has returned is not lost."""
    w = window.Window()
    assert w.acked("a", 0) == ()
    assert w.sent("a", (7,), 1, 0) == (7,)
    assert w.frames == 0


def test_early_acks_are_bounded():
    """Acks of frames nobody sent do not pile up."""
    w = window.Window()
    for number in range(5000):
        w.acked(str(number), 0)
    assert w.sent("0", (1,), 1, 0) == ()
    assert w.sent("4999", (2,), 1, 0) == (2,)


def test_slow_acks_halve_and_fast_ones_grow():
    """The window halves while the oldest frame is older than 5 s and grows back under 1 s."""
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


def test_frames_cost_the_brain_no_more_than_their_goal():
    """The first frame is small; the next ones grow while each is ingested at once and shrink when one takes long."""
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
    assert w.frame_events == 500, "it took half a second of the brain's time, and waited for the rest"
    w.sent("slow again", (11,), 500, 20)
    w.acked("slow again", 20 + 1.25 * window.TARGET_FRAME_SECONDS)
    assert w.frame_events == 400, "what takes as long as it should, by what this one took"
    for number in range(10):
        w.sent(f"slow {number}", (number,), 50, 20 + number * 10)
        w.acked(f"slow {number}", 25 + number * 10)
    assert w.frame_events == window.FRAME_FIRST


def test_a_small_frame_tells_nothing_of_large_ones():
    """A trickle of single events that are acknowledged at once does not make frames grow."""
    w = window.Window()
    for number in range(20):
        w.sent(str(number), (number,), 1, number)
        w.acked(str(number), number + 0.01)
    assert w.frame_events == window.FRAME_FIRST


def test_never_below_the_floor():
    """A brain that never answers leaves a window that still tries."""
    w = window.Window()
    w.sent("x", (1,), 1, 0)
    for second in range(0, 600, 6):
        w.available(second)
    assert w.limit == window.MIN_EVENTS


def test_no_frame_waits_in_the_brain():
    """There is no room for a second frame until the first has its ack, or the brain seems to have skipped it."""
    w = window.Window()
    w.sent("a", (1,), 50, 1.0)
    assert w.available(1.0 + window.SLOW_ACK - 0.1) == 0
    assert w.available(1.0 + window.SLOW_ACK + 0.1) > 0
    w.sent("b", (2,), 50, 4.0)
    assert w.available(4.0 + window.SLOW_ACK - 0.1) == 0
    w.acked("b", 5.0)
    assert w.available(5.0 + window.ACK_PAUSE) > 0, "what was left behind keeps nobody waiting"


def test_silence_counts_from_the_last_ack():
    """Nothing is sent again while acks of anything arrive, however old the oldest frame is."""
    w = window.Window()
    w.sent("a", (1,), 1, 0)
    w.sent("b", (2,), 1, 0)
    w.acked("b", 80)
    assert not w.ack_timed_out(100)
    assert w.ack_timed_out(171)


def test_what_is_left_behind_takes_no_room():
    """A frame that the brain has skipped neither shrinks the window nor fills it; its late ack still counts."""
    w = window.Window()
    w.sent("skipped", (1, 2), 2, 0)
    w.sent("next", (3,), 1, 1)
    assert w.acked("next", 2) == (3,)
    assert (w.available(60), w.limit) == (1000, 1000)
    assert (w.events, w.frames) == (2, 1), "it is not delivered all the same"
    assert w.acked("skipped", 61) == (1, 2)
    assert (w.events, w.frames) == (0, 0)


def test_what_is_left_behind_is_sent_again():
    """Acks that go on arriving for others do not put off the resend of a skipped frame, even those that come early."""
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


def test_silence_needs_something_in_flight():
    """An idle session is not silent, and the clock starts with the first frame after idleness."""
    w = window.Window()
    assert not w.ack_timed_out(1000)
    w.sent("a", (1,), 1, 1000)
    assert not w.ack_timed_out(1001)


def test_reset_forgets():
    """After a reset everything counts as not sent."""
    w = window.Window()
    w.sent("a", (1,), 1, 0)
    w.reset()
    assert (w.frames, w.events) == (0, 0)
    assert w.acked("a", 1) == ()


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(1, 500)), max_size=60)
)
def test_events_never_go_negative(steps):
    """Whatever order frames and acks come in, the count equals what is really in flight."""
    w, flying = window.Window(), {}
    for now, (name, is_ack, size) in enumerate(steps):
        if is_ack:
            w.acked(name, now)
            flying.pop(name, None)
        elif name not in flying and not w.sent(name, (1,), size, now):
            flying[name] = size
    assert w.events == sum(flying.values())
