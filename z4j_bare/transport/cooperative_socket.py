"""A non-blocking socket whose waits go through the backend.

Three things follow: a copy of a loop in a forked child leaves before it touches the parent's socket, TLS objects are never
used by two threads at once, and one time-out rule holds in every runtime.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from z4j_bare.concurrency import BaseConcurrency
from z4j_bare.errors import ForkedChildError

CHUNK = 64 * 1024


class CooperativeSocket:
    """What ``websocket-client`` gets in place of the socket it connected.

    :param timeout: seconds that ``recv`` waits for the first byte and ``send`` for room before ``TimeoutError``.
    """

    def __init__(
        self, sock: Any, backend: BaseConcurrency, timeout: float, send_timeout: float
    ) -> None:
        sock.setblocking(
            False
        )  # not settimeout(0.0): eventlet's TLS socket takes that for a deadline that has passed
        self._sock = sock
        self._backend = backend
        self._timeout = timeout
        self.send_timeout = send_timeout
        self._ahead = b""
        # Only real threads ever contend for it, and never for longer than one non-blocking call.
        self._turn = threading.Lock()

    def recv(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes, or ``b""`` at the end of the line."""
        if not self._ahead:
            self._ahead = self._retry(
                lambda: self._sock.recv(CHUNK), self._timeout, wants_write=False
            )
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def send(self, data: bytes) -> int:
        """Write some of ``data`` and return how much."""
        return int(self._retry(lambda: self._sock.send(data), self.send_timeout, wants_write=True))

    def offer(self, data: bytes) -> None:
        """Write ``data`` if the socket takes it at once; never waits. Raises ``OSError`` when it does not."""
        with self._turn:
            self._sock.send(data)

    def gettimeout(self) -> float:
        """Return 0: ``websocket-client`` then calls ``recv`` and ``send`` as they are, without a selector of its own."""
        return 0.0

    def settimeout(self, timeout: float | None) -> None:
        """Take the reader's time-out in seconds."""
        self._timeout = self._timeout if timeout is None else timeout

    def fileno(self) -> int:
        """Return the file descriptor, -1 once closed."""
        return int(self._sock.fileno())

    def shutdown(self, how: int) -> None:
        """Break the line; wakes whoever waits for it."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Release the file descriptor. For the owner, after its tasks have left."""
        self._sock.close()

    def _retry(self, action: Callable[[], Any], timeout: float, *, wants_write: bool) -> Any:
        while True:
            if self._backend.forked():
                raise ForkedChildError  # this is a copy of a loop, and the socket is the parent's
            try:
                with self._turn:
                    return action()
            except BlockingIOError:
                write = wants_write
            except OSError as error:
                # Without importing ssl for a plain line: TLS says what it waits for by the name of its error.
                write = type(error).__name__ == "SSLWantWriteError"
                if not write and type(error).__name__ != "SSLWantReadError":
                    raise
            wait = self._backend.wait_writable if write else self._backend.wait_readable
            if not wait(self._sock, timeout):
                raise TimeoutError("the line is silent")
