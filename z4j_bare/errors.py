"""One tree of errors, split by whose fault it is.

Only :class:`HostConfigurationError` ever reaches the host, and only out of ``install_agent`` or ``start()``. The others
travel between rooms and end in the supervisor (remote, network) or in the store's guard (local storage).
"""

from __future__ import annotations

from z4j_core.errors import ConfigError


class AgentError(Exception):
    """Base of everything this package raises on its own account."""


class HostConfigurationError(AgentError, ConfigError, RuntimeError):
    """A setting is missing or wrong; the message names it and the fix.

    Also a ``ConfigError`` because adapters catch that by name, and a ``RuntimeError`` because the existing agent's
    ``start()`` raises that for a bad secret.
    """


class RemoteError(AgentError):
    """The brain said no, or said something that is not the protocol.

    ``code`` is the WebSocket close code or the HTTP status, ``None`` when there was neither. ``retry_after`` is the
    server's own wish in seconds.
    """

    def __init__(
        self, message: str, *, code: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class RemoteProtocolError(RemoteError):
    """The peer broke the protocol: bad JSON, bad signature, replay, a frame out of place."""


class AuthenticationRejectedError(RemoteError):
    """Token, project, address or signature refused (4401, 4003, 4403, HTTP 401 and 403)."""


class IncompatibleError(RemoteError):
    """Somebody has to upgrade something (4426, 4427)."""


class NetworkError(AgentError, ConnectionError):
    """The line failed: refused, reset, timed out, closed."""

    def __init__(
        self, message: str, *, code: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class SessionLimitError(NetworkError):
    """The brain has no place for this session: a limit is reached, or another process took it (4002, 4429, HTTP 429)."""


class PoisonRowError(NetworkError):
    """A session died of one frame, and the search for the row that the brain cannot take has come a step further."""


class ScheduleStreamError(NetworkError):
    """The brain acknowledges a schedule stream no more: a row of it was lost on the way, to a full or failing disk."""


class FrameTooLargeError(AgentError):
    """A frame does not fit what the brain accepts in one piece; the session stands, and a smaller one may follow.

    ``size`` is what it would have taken on the wire and ``limit`` what there is room for, both in bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"a frame takes {size} bytes of at most {limit}")
        self.size = size
        self.limit = limit


class CommandError(AgentError):
    """An operator's command was not carried out; the text is the answer.

    ``indeterminate`` says that it may have happened all the same.
    """

    def __init__(self, message: str, *, indeterminate: bool = False) -> None:
        super().__init__(message)
        self.indeterminate = indeterminate


class LocalStorageError(AgentError):
    """The disk failed: full, read-only, corrupt, locked for too long."""


class InterpreterShutdownError(AgentError, RuntimeError):
    """No task can be started: CPython 3.12 and later start no thread once the interpreter is going down."""


class ForkedChildError(BaseException):
    """Raised inside an agent loop that finds itself copied into a forked child.

    Not an ``Exception``: no handler of ours or of an adapter may take it for a failure and carry on. ``spawn`` swallows
    it, which is how a loop leaves silently (greenlets survive ``os.fork``; gevent #316 declined to change that).
    """
