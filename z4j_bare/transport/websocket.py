"""The WebSocket transport, based on the ``WebSocket`` class of ``websocket-client``."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from z4j_bare.errors import AgentError, NetworkError, UnavailableError
from z4j_bare.interfaces import ITransport
from z4j_bare.transport.cooperative_socket import CooperativeSocket
from z4j_bare.transport.error_text import describe_error, printable
from z4j_bare.wire import close_codes

if TYPE_CHECKING:
    import ssl

    from z4j_bare.concurrency import BaseConcurrency

#: Timeout in seconds of DNS, TCP, TLS and the upgrade together, for each address of the host.
CONNECT_TIMEOUT = 10.0

#: Seconds to wait for ``hello_ack``. A brain to which many agents connect at once needs more than
#: 10 s.
HELLO_TIMEOUT = 30.0

#: Maximum seconds that a frame waits for space in the socket. Then the connection counts as lost.
SEND_TIMEOUT = 20.0

#: Seconds without a byte from the brain after which the agent sends a ping.
#: The brain sends a ping every 60 s.
PING_AFTER = 30.0

#: Seconds without a byte from the brain after which the connection counts as lost.
DEAD_AFTER = 75.0

#: Maximum bytes of an incoming frame. The brain's frames are smaller than 1 MiB.
MAX_FRAME_BYTES = 2 * 1024 * 1024

#: The close code that reports a normal end of the session.
NORMAL_CLOSURE = 1000

#: Maximum bytes of an outgoing message that are masked in one step.
MASK_CHUNK = 4096

# The constants ``_BINARY`` to ``_LENGTH_64`` describe the header of a frame (RFC 6455, 5.2).

#: The first byte of a complete binary message.
_BINARY = 0x82

#: The bit of the second byte that marks a masked message.
_MASKED = 0x80

#: Values of the second byte that announce a length field of 16 bits and of 64 bits.
_LENGTH_16, _LENGTH_64 = 126, 127

#: Format of the close code at the start of a close frame's body.
_CLOSE_CODE = struct.Struct("!H")


@implementer(ITransport)
class WebSocketTransport:
    """One WebSocket session.

    :param url: from :func:`~z4j_bare.transport.endpoint.websocket_url`.
    :param token: returns the token. Called at every connect, because a token file can be rotated.
    """

    name = "ws"
    synchronous_acks = False

    def __init__(
        self,
        url: str,
        token: Callable[[], str],
        backend: BaseConcurrency,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._url = url
        self._token = token
        self._backend = backend
        self._tls = tls
        self._send_lock = backend.lock()
        self._ws: Any = None
        self._last_received_at = 0.0
        self._pinged = False
        self._sending = False

    def connect(self, hello: bytes) -> bytes:
        """Upgrade, send ``hello`` and return the first message; see ``ITransport``."""
        self.upgrade()
        try:
            self.send(lambda: hello)
        except NetworkError:
            # A brain that rejects the token closes the connection at once.
            # Reading the close frame raises the error for the close code.
            self.receive(CONNECT_TIMEOUT)
            raise
        deadline = self._backend.now() + HELLO_TIMEOUT
        while (remaining := deadline - self._backend.now()) > 0:
            answer = self.receive(remaining)
            if answer is not None:  # ``receive`` also returns ``None`` after a ping
                return answer
        raise UnavailableError(
            f"the brain accepted WebSocket but sent no hello_ack within {HELLO_TIMEOUT:.0f} s: it "
            "is overloaded, or a proxy holds messages back; for such a proxy set "
            "Z4J_TRANSPORT=longpoll"
        )

    def upgrade(self) -> None:
        """Open the connection and complete the WebSocket upgrade (HTTP 101)."""
        import websocket

        # TLS options are passed here, because ``WebSocket.connect`` ignores them.
        tls = {} if self._tls is None else {"context": self._tls}
        # The library's check of UTF-8 is disabled.
        # The check takes 0.3 s per MiB, and the JSON parser checks UTF-8 as well.
        self._ws = websocket.WebSocket(
            sslopt=tls, enable_multithread=False, fire_cont_frame=False, skip_utf8_validation=True
        )
        self._ws.settimeout(CONNECT_TIMEOUT)
        try:
            self._backend.call_blocking(self._ws.connect, self._url, **self._options())
        except websocket.WebSocketBadStatusException as error:
            retry_after = _retry_after(error.resp_headers)
            raise close_codes.error_for_http_status(
                error.status_code, "the WebSocket upgrade was rejected", retry_after
            ) from None
        except (websocket.WebSocketException, OSError, ValueError) as error:
            status = self._ws.getstatus()
            if status is not None:  # set only for a redirect, which the library accepts
                raise close_codes.error_for_http_status(
                    status, "a redirect: set Z4J_BRAIN_URL to its target"
                ) from None
            kind = UnavailableError if _failed_before_upgrade(error) else NetworkError
            raise kind(f"cannot reach the brain: {describe_error(error)}") from None
        self._ws.sock = CooperativeSocket(
            self._ws.sock, self._backend, CONNECT_TIMEOUT, SEND_TIMEOUT
        )
        self._ws.lock = self._backend.lock()
        self._ws.frame_buffer.recv_strict = _bounded(self._ws.frame_buffer.recv_strict)
        # The library must not answer a close frame, because an error of its answer would hide the
        # close code. ``abort`` sends the answer instead.
        self._ws.send_close = lambda *_args, **_options: None
        self._last_received_at = self._backend.now()

    def send(self, build: Callable[[], bytes]) -> int:
        """Build and write one binary frame under one lock; see ``ITransport``."""
        import websocket

        with self._send_lock:
            frame = build()
            self._sending = True
            try:
                self._connected().send_frame(BinaryFrame(frame))
            except (websocket.WebSocketException, OSError) as error:
                raise NetworkError(
                    f"the connection was lost while sending: {describe_error(error)}"
                ) from None
            finally:
                self._sending = False
        return len(frame)

    def receive(self, timeout: float) -> bytes | None:
        """Return the next data message; see ``ITransport``.

        Also answers pings, and sends a ping after ``PING_AFTER`` seconds without data.
        """
        import websocket

        try:
            ws = self._connected()
            ws.sock.settimeout(timeout)
            opcode, frame = ws.recv_data_frame(True)
        except websocket.WebSocketTimeoutException:
            self._check_idle()
            return None
        except (websocket.WebSocketException, OSError, ValueError) as error:
            raise NetworkError(f"the connection was lost: {describe_error(error)}") from None
        self._last_received_at, self._pinged = self._backend.now(), False
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            raise close_error(frame.data)
        return (
            bytes(frame.data)
            if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY)
            else None
        )

    def abort(self) -> None:
        """Abort the connection. Any task may call this.

        ``WebSocket.close`` is not used, because it would hang while another task waits for data.

        Sends a close frame if no frame is being written and the socket has space. A forked child
        does not touch the connection, because it belongs to the parent.
        """
        sock = getattr(self._ws, "sock", None)
        if sock is None or self._backend.forked():
            return
        try:
            # Before the upgrade is complete, the socket is not yet a ``CooperativeSocket``.
            if isinstance(sock, CooperativeSocket) and not self._sending:
                sock.try_send(_close_frame())
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the connection is already closed

    def close(self) -> None:
        """Abort the connection and release it."""
        self.abort()
        ws, self._ws = self._ws, None
        sock = getattr(ws, "sock", None)
        if sock is not None and not self._backend.forked():
            try:
                sock.close()
            except OSError:
                pass

    def _connected(self) -> Any:
        if self._ws is None or self._ws.sock is None:
            raise NetworkError("the connection is closed")
        return self._ws

    def _check_idle(self) -> None:
        idle = self._backend.now() - self._last_received_at
        if idle > DEAD_AFTER:
            raise NetworkError(f"no data from the brain for {idle:.0f} s")
        if idle > PING_AFTER and not self._pinged:
            self._pinged = True
            try:
                self._connected().ping()
            except OSError as error:
                raise NetworkError(f"the connection was lost: {describe_error(error)}") from None

    def _options(self) -> dict[str, Any]:
        return {
            "header": [f"Authorization: Bearer {self._token()}"],
            "suppress_origin": True,
            # No redirects, because the library would send the Authorization header to their
            # targets.
            "redirect_limit": 0,
        }


class BinaryFrame:
    """A binary message for ``WebSocket.send_frame``, in place of the library's ``ABNF``.

    ``websocket-client`` masks a message as one large integer: 115 to 260 us for 60 KB, and 420 us
    for 126 KB. Masking in chunks takes 85 us for 60 KB and 170 us for 126 KB.
    """

    __slots__ = ("_data", "get_mask_key")

    def __init__(self, data: bytes) -> None:
        self._data = data
        #: Source of the mask: ``get_mask_key(n)`` returns n random bytes.
        self.get_mask_key = os.urandom

    def format(self) -> bytes:
        """Return the bytes of the frame."""
        key = self.get_mask_key(4)
        return b"".join((_frame_header(len(self._data)), key, *masked(key, self._data)))


def masked(key: bytes, data: bytes) -> list[bytes]:
    """Return ``data`` in chunks, masked with the four bytes of ``key`` (RFC 6455, 5.3)."""
    width = min(MASK_CHUNK, 4 * (len(data) // 4 + 1))
    mask = int.from_bytes(key * (width // 4), "little")
    chunks = (data[start : start + width] for start in range(0, len(data), width))
    # The masked bytes are cut, because the last chunk may be shorter than the mask.
    return [
        (int.from_bytes(chunk, "little") ^ mask).to_bytes(width, "little")[: len(chunk)]
        for chunk in chunks
    ]


def close_error(data: bytes) -> AgentError:
    """Return the error for the body of a close frame: two bytes of code, then the reason."""
    code = _CLOSE_CODE.unpack_from(data)[0] if len(data) >= _CLOSE_CODE.size else None
    reason = data[_CLOSE_CODE.size :].decode(errors="replace")
    return close_codes.error_for_close_code(code, printable(reason))


def preload() -> None:
    """Import ``websocket-client`` at start. A later import would block the hub for 0.2 s."""
    import websocket  # noqa: F401


def _failed_before_upgrade(error: Exception) -> bool:
    """Whether DNS, TCP or TLS failed, so that plain HTTP would fail as well.

    The library reports a reset or an end of TLS in the same way before and during the upgrade. Both
    count as failures of the upgrade.
    """
    import ssl

    from websocket import WebSocketAddressException, WebSocketException

    if isinstance(error, WebSocketException):
        return isinstance(error, WebSocketAddressException)
    during_upgrade = (
        ConnectionResetError,
        ConnectionAbortedError,
        BrokenPipeError,
        ssl.SSLEOFError,
        ssl.SSLZeroReturnError,
    )
    return isinstance(error, OSError) and not isinstance(error, during_upgrade)


def _frame_header(size: int) -> bytes:
    if size < _LENGTH_16:
        return struct.pack("!BB", _BINARY, _MASKED | size)
    if size < 1 << 16:
        return struct.pack("!BBH", _BINARY, _MASKED | _LENGTH_16, size)
    return struct.pack("!BBQ", _BINARY, _MASKED | _LENGTH_64, size)


def _close_frame() -> bytes:
    from websocket import ABNF

    return bytes(ABNF.create_frame(_CLOSE_CODE.pack(NORMAL_CLOSURE), ABNF.OPCODE_CLOSE).format())


def _bounded(read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Return ``read`` with a check that rejects frames of more than ``MAX_FRAME_BYTES``.

    Without the check, the library would wait for the whole frame.
    """

    def bounded(size: int) -> bytes:
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"the frame has {size} bytes")
        return read(size)

    return bounded


def _retry_after(headers: Mapping[str, str] | None) -> float | None:
    """Return the seconds in ``Retry-After``; ``None`` if the header is absent or a date."""
    text = (headers or {}).get("retry-after", "")
    return float(text) if text.isdecimal() else None
