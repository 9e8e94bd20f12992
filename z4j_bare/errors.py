"""The exceptions of this package.

``install_agent`` and ``start()`` raise only :class:`HostConfigurationError` to the host. The agent
handles all other errors.
"""

from __future__ import annotations

from z4j_core.errors import ConfigError, ConflictError, NotFoundError


class AgentError(Exception):
    """Base class of all errors that this package raises."""


class HostConfigurationError(AgentError, ConfigError, RuntimeError):
    """A setting is missing or wrong. The message names the setting and the fix.

    Adapters catch this error as a ``ConfigError``. The class is also a ``RuntimeError``, because
    ``start()`` of z4j-bare 1.13 raises a ``RuntimeError`` for a wrong secret.
    """


class RemoteError(AgentError):
    """The brain refused a request, or its response violates the protocol.

    :param code: the WebSocket close code or the HTTP status, if there was one.
    :param retry_after: seconds to wait before the next attempt, if the brain sent this number.
    """

    def __init__(
        self, message: str, *, code: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class RemoteProtocolError(RemoteError):
    """The brain sent invalid JSON, a wrong signature, a replayed frame or an unexpected frame."""


class AuthenticationRejectedError(RemoteError):
    """The brain refused the token, project, address or signature.

    Close codes 4401, 4003 and 4403; HTTP status 401 and 403.
    """


class IncompatibleError(RemoteError):
    """The versions of brain and agent do not match. One of the two must be upgraded.

    Close codes 4426 and 4427.
    """


class NetworkError(AgentError, ConnectionError):
    """The connection was refused, reset or closed, or it timed out.

    :param code: the WebSocket close code or the HTTP status, if there was one.
    :param retry_after: seconds to wait before the next attempt, if the brain sent this number.
    """

    def __init__(
        self, message: str, *, code: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class UnavailableError(NetworkError):
    """The brain did not answer, and WebSocket is not the cause.

    DNS, TCP or TLS failed, or no ``hello_ack`` followed a successful upgrade.
    """


class SessionLimitError(NetworkError):
    """A limit of the brain was reached, or another process with this worker id has connected.

    Close codes 4002 and 4429; HTTP status 429.
    """


class TurnedAwayError(SessionLimitError):
    """The brain ended the session at its start, because the agent's token has too many sessions.

    Close code 4429 after ``hello_ack``.
    """


class PoisonRowError(NetworkError):
    """The session ended while suspected poison rows were in flight.

    The next session sends fewer of these rows, to find the poison row.
    """


class ScheduleStreamError(NetworkError):
    """The brain acknowledges no more frames of a schedule stream, because one frame was lost."""


class FrameTooLargeError(AgentError):
    """A frame exceeds the size that the brain accepts. The session continues."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a frame of {size} bytes exceeds the limit of {limit} bytes")
        self.size = size
        self.limit = limit


class CommandError(AgentError):
    """A command failed. The message becomes the error text of the command's result.

    :param indeterminate: whether the command may have taken effect although it failed.
    """

    def __init__(self, message: str, *, indeterminate: bool = False) -> None:
        super().__init__(message)
        self.indeterminate = indeterminate


class ScheduleConflictError(AgentError, ConflictError, ValueError):
    """A schedule differs from what the operator saw, or its name is taken.

    The class is also a ``ValueError``, because z4j-bare 1.13 raises a ``ValueError``.
    """


class ScheduleNotFoundError(AgentError, NotFoundError, ValueError):
    """The schedule that an operator wants to change does not exist."""


class LocalStorageError(AgentError):
    """The disk failed: it is full, read-only or corrupt, or was locked for too long."""


class InterpreterShutdownError(AgentError, RuntimeError):
    """No task can be started, because CPython 3.12 and later start no threads during shutdown."""


class ForkedChildError(BaseException):
    """Raised in a forked child, to end the copy of a task of the agent.

    ``os.fork`` copies greenlets into the child, and gevent will not change this (gevent #316). The
    class is not a subclass of ``Exception``, so that no ``except Exception`` continues a copied
    loop.
    """
