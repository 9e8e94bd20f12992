"""The errors for close codes and HTTP statuses."""

import pytest

from z4j_bare.errors import (
    AuthenticationRejectedError,
    IncompatibleError,
    NetworkError,
    RemoteProtocolError,
    SessionLimitError,
    TurnedAwayError,
)
from z4j_bare.wire import close_codes

#: Close code, exception class, and a part of its text.
CLOSE_CODES = [
    (4401, AuthenticationRejectedError, "Z4J_TOKEN"),
    (4003, AuthenticationRejectedError, "revoked"),
    (4403, AuthenticationRejectedError, "Z4J_AGENT_IP_ALLOWLIST"),
    (4400, RemoteProtocolError, "frame"),
    (4426, IncompatibleError, "upgrade"),
    (4427, IncompatibleError, "upgrade"),
    (4002, SessionLimitError, "worker id"),
    (4408, NetworkError, "no frame"),
    (4429, SessionLimitError, "64 sessions"),
    (1011, NetworkError, "failed"),
    (1012, NetworkError, "restarting"),
    (1001, NetworkError, "shutting down"),
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


@pytest.mark.parametrize(("code", "kind", "hint"), CLOSE_CODES)
def test_close_code_maps_to_error_with_hint(code, kind, hint):
    """Every documented close code has its exception class and a text that names what to check."""
    error = close_codes.error_for_close_code(code, "because")
    assert type(error) is kind
    assert hint in str(error)
    assert "because" in str(error)
    assert error.code == code


def test_limit_during_session_names_cap_and_cure():
    """Code 4429 of an established session means too many sessions; other errors are unchanged."""
    error = close_codes.explain_limit(close_codes.error_for_close_code(4429))
    assert type(error) is TurnedAwayError
    assert error.code == 4429
    for part in ("64 sessions", "Z4J_WS_PER_AGENT_CONCURRENCY_CAP", "Z4J_TOKEN of its own"):
        assert part in str(error)
    for code in (4002, 1012):
        other = close_codes.error_for_close_code(code)
        assert close_codes.explain_limit(other) is other


@pytest.mark.parametrize(("status", "kind", "hint"), STATUSES)
def test_http_status_maps_to_error_with_hint(status, kind, hint):
    """HTTP statuses map to the same classes, and ``Retry-After`` is kept."""
    error = close_codes.error_for_http_status(status, "because", retry_after=7.0)
    assert type(error) is kind
    assert hint in str(error)
    assert "because" in str(error)
    assert (error.code, error.retry_after) == (status, 7.0)


@pytest.mark.parametrize(
    ("clock_offset", "expected_text"),
    [
        (75.0, "this host's clock is 75 s behind the brain's"),
        (-3600.4, "this host's clock is 3600 s ahead of the brain's"),
        (
            49.0,
            (
                "Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE): the brain rejected a signature; "
                "the clocks differ by only 49 s"
            ),
        ),
        (None, "Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE): the brain rejected a signature"),
    ],
)
def test_rejected_signature_names_clock_or_secret(clock_offset, expected_text):
    """A rejected signature is attributed to the clock only if the clocks differ by enough."""
    for error in (
        close_codes.error_for_close_code(4403),
        AuthenticationRejectedError("the first upload", code=409),
    ):
        error_with_cause = close_codes.explain_signature_error(error, clock_offset)
        assert expected_text in str(error_with_cause)
        assert (type(error_with_cause), error_with_cause.code) == (
            AuthenticationRejectedError,
            error.code,
        )
    ours = close_codes.explain_signature_error(
        RemoteProtocolError("the brain's frame failed verification: stale", code=4403), clock_offset
    )
    assert ("clock is" in str(ours)) == ("clock is" in expected_text), (
        "the same for a frame that the agent rejected"
    )
    revoked = close_codes.error_for_close_code(4003)
    assert close_codes.explain_signature_error(revoked, clock_offset) is revoked
