"""A non-blocking socket that waits through the concurrency backend.

In a forked child, ``recv`` and ``send`` raise ``ForkedChildError`` instead of using the parent's
socket. Two threads never use a TLS object at the same time. Timeouts work in the same way in every
concurrency mode.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from z4j_bare.concurrency import BaseConcurrency
from z4j_bare.errors import ForkedChildError

#: Maximum bytes of one read from the socket.
READ_SIZE = 64 * 1024

_Result = TypeVar("_Result")


class CooperativeSocket:
    """Replaces a connected socket inside ``websocket-client`` and ``http.client``.

    :param timeout: seconds that ``recv`` waits for the first byte before it raises
        ``TimeoutError``.
    :param send_timeout: seconds that ``send`` waits for free space before it raises
        ``TimeoutError``.
    """

    def __init__(
        self,
        sock: socket.socket,
        backend: BaseConcurrency,
        timeout: float,
        send_timeout: float,
    ) -> None:
        # With ``settimeout(0)``, eventlet's TLS socket would time out at once.
        sock.setblocking(False)
        self._sock = sock
        self._backend = backend
        self._timeout = timeout
        self.send_timeout = send_timeout
        self._read_buffer = b""
        # Held only during one non-blocking call, so that greenlets never wait for the lock.
        self._lock = threading.Lock()

    def recv(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes, or ``b""`` at the end of the stream."""
        if not self._read_buffer:
            self._read_buffer = self._retry(
                lambda: self._sock.recv(READ_SIZE), self._timeout, wants_write=False
            )
        data, self._read_buffer = self._read_buffer[:size], self._read_buffer[size:]
        return data

    def send(self, data: bytes) -> int:
        """Write ``data`` or its first bytes; return the number of bytes written."""
        return self._retry(lambda: self._sock.send(data), self.send_timeout, wants_write=True)

    def try_send(self, data: bytes) -> None:
        """Write ``data`` without waiting; raise ``OSError`` if the socket has no space."""
        with self._lock:
            self._sock.send(data)

    def gettimeout(self) -> float:
        """Return 0, so that ``websocket-client`` does not wait with its own selector."""
        return 0.0

    def settimeout(self, timeout: float | None) -> None:
        """Set the read timeout in seconds; ``None`` keeps the current timeout."""
        self._timeout = self._timeout if timeout is None else timeout

    def fileno(self) -> int:
        """Return the file descriptor, or -1 after ``close``."""
        return self._sock.fileno()

    def shutdown(self, how: int) -> None:
        """Shut the connection down and wake all waiting calls of ``recv`` and ``send``."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Release the file descriptor.

        Only the owner may call this method, after all calls of ``recv`` and ``send`` have returned.
        """
        self._sock.close()

    def _retry(
        self, action: Callable[[], _Result], timeout: float, *, wants_write: bool
    ) -> _Result:
        while True:
            if self._backend.forked():
                raise ForkedChildError  # the socket belongs to the parent process
            try:
                with self._lock:
                    return action()
            except BlockingIOError:
                write = wants_write
            except OSError as error:
                # The class is compared by name, so that a plain connection does not import ssl.
                write = type(error).__name__ == "SSLWantWriteError"
                if not write and type(error).__name__ != "SSLWantReadError":
                    raise
            wait = self._backend.wait_writable if write else self._backend.wait_readable
            if not wait(self._sock, timeout):
                raise TimeoutError("the connection timed out")
