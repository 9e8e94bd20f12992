"""Maps close codes and HTTP statuses to errors (``docs/protocol.md``, "Close codes")."""

from __future__ import annotations

from z4j_bare.errors import (
    AgentError,
    AuthenticationRejectedError,
    IncompatibleError,
    NetworkError,
    RemoteError,
    RemoteProtocolError,
    SessionLimitError,
    TurnedAwayError,
)
from z4j_bare.wire.clock import describe_offset

_CREDENTIALS_REJECTED = (
    "check Z4J_TOKEN (or Z4J_TOKEN_FILE): the brain does not know this token, or the token was "
    "revoked, or its project is archived"
)
_AGENT_INACTIVE = (
    "this agent was revoked or its project was archived in the brain: create a new Z4J_TOKEN"
)
_ADDRESS_NOT_ALLOWED = "this host's address is not in the brain's Z4J_AGENT_IP_ALLOWLIST"
_SESSION_REPLACED = (
    "another process connected with the same worker id, perhaps a copied or restored one: "
    "this process continues with a new worker id"
)
_LIMIT_REACHED = (
    "the brain's limit is reached: 600 connections a minute from one address, "
    "or 64 sessions of one token"
)
_TURNED_AWAY = (
    "the brain turned this agent away: the token has all sessions that the brain allows (64 "
    "sessions, or its setting Z4J_WS_PER_AGENT_CONCURRENCY_CAP); events wait in the buffer until a "
    "session ends; create one agent in the brain, with a Z4J_TOKEN of its own, for each worker or "
    "group of workers"
)
_BAD_SIGNATURE = "check Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE): the brain rejected a signature"

#: The lowest close code that the brain defines.
#: The WebSocket standard defines codes from 1000 on. Codes below 1000 are HTTP statuses.
MIN_APPLICATION_CODE = 4000

#: The close code of a session that another process with the same worker id has replaced.
SESSION_REPLACED = 4002

#: The close code of a connection beyond one of the brain's limits.
LIMIT_REACHED = 4429

_CLOSE_CODES: dict[int, tuple[type[RemoteError | NetworkError], str]] = {
    1000: (NetworkError, "the brain closed the session"),
    1001: (NetworkError, "the brain is shutting down"),
    1009: (NetworkError, "a frame was too large for the brain"),
    1011: (NetworkError, "the brain failed to process a frame, or its keepalive timed out"),
    1012: (NetworkError, "the brain is restarting"),
    SESSION_REPLACED: (SessionLimitError, _SESSION_REPLACED),
    4003: (AuthenticationRejectedError, _AGENT_INACTIVE),
    4400: (RemoteProtocolError, "the brain could not parse a frame"),
    4401: (AuthenticationRejectedError, _CREDENTIALS_REJECTED),
    4403: (AuthenticationRejectedError, _ADDRESS_NOT_ALLOWED),
    4408: (NetworkError, "the brain received no frame for too long: is this process blocked?"),
    4426: (
        IncompatibleError,
        "the brain uses another protocol version: upgrade z4j-bare or the brain",
    ),
    4427: (
        IncompatibleError,
        "the brain rejects this agent version: upgrade z4j-bare or the brain",
    ),
    LIMIT_REACHED: (SessionLimitError, _LIMIT_REACHED),
}

_HTTP_STATUSES: dict[int, tuple[type[RemoteError | NetworkError], str]] = {
    400: (NetworkError, "HTTP 400: is the host of Z4J_BRAIN_URL in the brain's Z4J_ALLOWED_HOSTS?"),
    401: (AuthenticationRejectedError, _CREDENTIALS_REJECTED),
    403: (AuthenticationRejectedError, f"the project is archived, or {_ADDRESS_NOT_ALLOWED}"),
    404: (NetworkError, "HTTP 404: is Z4J_BRAIN_URL the brain's address, including its path?"),
    409: (NetworkError, "HTTP 409: the brain no longer knows this session"),
    429: (SessionLimitError, "HTTP 429: more than 600 requests a minute from this address"),
    503: (NetworkError, "HTTP 503: the brain is starting or has no capacity"),
}

#: Close codes and HTTP statuses whose cause can be the content of a single frame.
#: The brain sends them if it cannot process the frame. A proxy sends them to reject the frame.
_MAY_BE_POISON = frozenset({1009, 1011, 4400, 4403, 400, 403, 409, 422})

#: Codes with which the brain rejects a signature in an established session.
#: Before ``hello_ack`` these codes have other meanings.
_SIGNATURE_REJECTED = (4403, 409)

#: If the clocks differ by more than this many seconds, the clock is reported as the cause of a
#: rejected signature. Otherwise the key is reported as the cause. The brain allows a difference of
#: 60 s.
MAX_CLOCK_SKEW = 50.0


def error_for_close_code(code: int | None, reason: str = "") -> AgentError:
    """Return the error for a closed WebSocket.

    :param code: the close code, or ``None`` if there was none.
    """
    kind, text = _CLOSE_CODES.get(code or 0, (NetworkError, "the connection was lost"))
    return kind(_with_reason(text, reason), code=code)


def error_for_http_status(
    status: int, reason: str = "", retry_after: float | None = None
) -> AgentError:
    """Return the error for an HTTP response with an unexpected status."""
    kind, text = _HTTP_STATUSES.get(status, (NetworkError, f"HTTP {status}"))
    return kind(_with_reason(text, reason), code=status, retry_after=retry_after)


def may_be_rejected_signature(error: AgentError) -> bool:
    """Whether ``error``, which has ended an established session, may be a rejected signature."""
    return getattr(error, "code", None) in _SIGNATURE_REJECTED


def explain_signature_error(error: RemoteError, clock_offset: float | None) -> RemoteError:
    """Return an error that names the cause of a rejected signature: the clock or the key.

    ``error`` must have ended an established session. An error that does not report a rejected
    signature, or whose cause is unknown, is returned unchanged.

    :param clock_offset: seconds by which the brain's clock is ahead of this host's, if known.
    """
    if not may_be_rejected_signature(error):
        return error
    if clock_offset is not None and abs(clock_offset) > MAX_CLOCK_SKEW:
        text = f"{describe_offset(clock_offset)}, which allows 60 s: set this host's clock (NTP)"
    elif isinstance(error, AuthenticationRejectedError):
        difference = (
            "" if clock_offset is None else f"; the clocks differ by only {abs(clock_offset):.0f} s"
        )
        text = f"{_BAD_SIGNATURE}{difference}"
    else:
        return error
    return type(error)(text, code=error.code, retry_after=error.retry_after)


def explain_limit(error: AgentError) -> AgentError:
    """Return ``error``, or an error that names the limit if the code of ``error`` is 4429.

    ``error`` must have ended an established session, because before ``hello_ack`` the code 4429
    means too many connections a minute.
    """
    if isinstance(error, SessionLimitError) and error.code == LIMIT_REACHED:
        return TurnedAwayError(_TURNED_AWAY, code=error.code, retry_after=error.retry_after)
    return error


def may_be_poison(error: AgentError) -> bool:
    """Whether a frame may have caused ``error``, and may cause the same error if it is resent."""
    return getattr(error, "code", None) in _MAY_BE_POISON


def _with_reason(text: str, reason: str) -> str:
    return f"{text} ({reason})" if reason else text
