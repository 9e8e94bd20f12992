"""Exponential delays, and those of the reconnect loop."""

import pytest

from z4j_bare.errors import (
    AuthenticationRejectedError,
    IncompatibleError,
    NetworkError,
    PoisonRowError,
    RemoteProtocolError,
    SessionLimitError,
)
from z4j_bare.wire import backoff


def test_backoff_grows_from_initial_to_maximum_until_reset():
    """Delays grow by the factor up to the maximum, and a reset returns to the initial one."""
    delays = backoff.Backoff(0.5, 3.0)
    assert [delays.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    delays.reset()
    assert delays.next() == 0.5
    tripled = backoff.Backoff(1.0, 100.0, factor=3.0)
    assert [tripled.next() for _ in range(3)] == [1.0, 3.0, 9.0]


def test_backoff_delay_shows_next_delay_without_jitter():
    """``delay`` is the next delay without its random part, and ``increase`` skips one step."""
    delays = backoff.Backoff(1.0, 8.0, jitter=0.5, random=lambda: 1.0)
    assert (delays.delay, delays.next(), delays.delay) == (1.0, 1.5, 2.0)
    delays.increase()
    assert (delays.delay, delays.next()) == (4.0, 6.0)


def test_backoff_initial_delay_is_bounded_by_maximum():
    """An initial delay above the maximum becomes the maximum."""
    assert backoff.Backoff(5.0, 2.0).next() == 2.0


@pytest.mark.parametrize(
    ("error", "initial", "maximum"),
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
def test_reconnect_delay_doubles_up_to_maximum(error, initial, maximum):
    """The delay of each failure class doubles from its initial to its maximum value."""
    delays = backoff.ReconnectBackoff(random=lambda: 0.0)
    found = [delays.next(error) for _ in range(20)]
    assert found[:2] == [initial, min(initial * 2, maximum)]
    assert found[-1] == maximum


def test_jitter_adds_up_to_thirty_percent():
    """The random part of a delay is at most 30 percent of it."""
    delays = backoff.ReconnectBackoff(random=lambda: 1.0)
    assert delays.next(NetworkError("x")) == pytest.approx(1.3)
    assert delays.next(NetworkError("x")) == pytest.approx(2.6)


def test_only_long_session_resets_delays():
    """A short session keeps the delays, but resets the streaks that are reported to the brain."""
    delays = backoff.ReconnectBackoff(random=lambda: 0.0)
    assert [delays.next(NetworkError("x")), delays.next(SessionLimitError("x"))] == [1, 10]
    assert delays.on_connected() == {"connection": 2, "protocol": 0, "auth": 0}
    assert delays.streaks == {"connection": 0, "protocol": 0, "auth": 0}
    delays.on_session_end(29)
    assert [delays.next(NetworkError("x")), delays.next(SessionLimitError("x"))] == [2, 20]
    delays.on_session_end(30)
    assert [delays.next(NetworkError("x")), delays.next(SessionLimitError("x"))] == [1, 40]
    delays.on_session_end(1800)
    assert delays.next(SessionLimitError("x")) == 10


def test_failure_classes_have_separate_delays():
    """Network errors do not lengthen the delay after an authentication error."""
    delays = backoff.ReconnectBackoff(random=lambda: 0.0)
    for _ in range(5):
        delays.next(NetworkError("x"))
    assert delays.next(AuthenticationRejectedError("x")) == 10


def test_retry_after_is_minimum_delay():
    """A delay is not shorter than ``Retry-After``, of which at most an hour counts."""
    delays = backoff.ReconnectBackoff(random=lambda: 0.0)
    assert delays.next(NetworkError("x", retry_after=17)) == 17
    assert delays.next(NetworkError("x", retry_after=10**9)) == 3600
