"""The exceptions of this package.

Only :class:`HostConfigurationError` reaches the host, from ``install_agent`` or ``start()``. The
session handles remote and network errors, and the buffer handles storage errors.
"""

from __future__ import annotations

from z4j_core.errors import ConfigError


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
    :param retry_after: seconds after which the brain asks the agent to try again, if it said so.
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
    """The versions of brain and agent do not match, so one of the two has to be upgraded.

    Close codes 4426 and 4427.
    """


class NetworkError(AgentError, ConnectionError):
    """The connection failed: it was refused, reset or closed, or timed out.

    :param code: the WebSocket close code or the HTTP status, if there was one.
    :param retry_after: seconds after which the brain asks the agent to try again, if it said so.
    """

    def __init__(
        self, message: str, *, code: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class SessionLimitError(NetworkError):
    """A limit of the brain was reached, or another process with this worker id has connected.

    Close codes 4002 and 4429; HTTP status 429.
    """


class PoisonRowError(NetworkError):
    """The session ended while suspected poison rows were in flight.

    The next session sends fewer of these rows.
    """


class ScheduleStreamError(NetworkError):
    """The brain stopped acknowledging a schedule stream, because a failed disk lost a row."""


class FrameTooLargeError(AgentError):
    """A frame exceeds the size that the brain accepts. The session continues.

    :param size: the bytes that the frame would take on the wire.
    :param limit: the maximum number of bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a frame of {size} bytes exceeds the limit of {limit} bytes")
        self.size = size
        self.limit = limit


class CommandError(AgentError):
    """A command failed; the message is the error text of its result.

    :param indeterminate: whether the command may have taken effect although it failed.
    """

    def __init__(self, message: str, *, indeterminate: bool = False) -> None:
        super().__init__(message)
        self.indeterminate = indeterminate


class LocalStorageError(AgentError):
    """The disk failed: it is full, read-only or corrupt, or was locked for too long."""


class InterpreterShutdownError(AgentError, RuntimeError):
    """No task can be started: CPython 3.12 and later start no threads during shutdown."""


class ForkedChildError(BaseException):
    """Raised in an agent loop that was copied into a forked child.

    Greenlets survive ``os.fork`` (gevent #316, which will not be changed). The task ends without a
    log line. The class is not a subclass of ``Exception``, so that no handler of failures catches
    the error and continues the loop.
    """
