"""The brain over WebSocket, on ``websocket-client``'s low-level class (``field-notes`` C.8)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from z4j_bare.errors import AgentError, NetworkError
from z4j_bare.interfaces import ITransport
from z4j_bare.transport.binary import BinaryFrame
from z4j_bare.transport.cooperative_socket import CooperativeSocket
from z4j_bare.transport.error_text import printable, short
from z4j_bare.wire import close_codes

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds for DNS, TCP, TLS and upgrade together per address, and again for the ``hello_ack``.
CONNECT_TIMEOUT = 10.0

#: Seconds a frame may wait for room in the socket before the line counts as dead.
SEND_TIMEOUT = 20.0

#: Seconds without a byte from the brain before we ping, and before the line counts as dead. The brain pings every 60.
PING_AFTER = 30.0
DEAD_AFTER = 75.0

#: Bytes of one frame from the brain at most. Its own are far below 1 MiB.
LONGEST = 2 * 1024 * 1024

#: The close code of a peer that is done.
NORMAL = 1000


@implementer(ITransport)
class WebSocketTransport:
    """One WebSocket session.

    :param url: from :func:`~z4j_bare.transport.endpoint.websocket_url`.
    :param token: called at every connect, so that a rotated token file is noticed.
    :param tls: an ``ssl.SSLContext`` for a ``wss`` address.
    """

    name = "ws"
    confirms = False

    def __init__(
        self, url: str, token: Callable[[], str], backend: BaseConcurrency, tls: Any = None
    ) -> None:
        self._url = url
        self._token = token
        self._backend = backend
        self._tls = tls
        self._order = backend.lock()
        self._ws: Any = None
        self._heard = 0.0
        self._pinged = False
        self._sending = False

    def connect(self, hello: bytes) -> bytes:
        """Upgrade, say ``hello`` and return the first answer; see ``ITransport``."""
        self.upgrade()
        try:
            self.send(lambda: hello)
        except NetworkError:
            self.receive(
                CONNECT_TIMEOUT
            )  # who refuses the token hangs up at once, and the reason is still to be read
            raise
        answer = self.receive(CONNECT_TIMEOUT)
        if answer is None:
            raise NetworkError(f"no hello_ack within {CONNECT_TIMEOUT:.0f} s")
        return answer

    def upgrade(self) -> None:
        """Open the line as far as HTTP 101, which is also how to find out whether WebSocket gets through at all."""
        import websocket

        # TLS options belong here: ``connect`` takes them without a word and ignores them.
        tls = {} if self._tls is None else {"context": self._tls}
        # Its check that text is UTF-8 is a loop in Python, 0.3 s a MiB; the parser finds out as well.
        self._ws = websocket.WebSocket(
            sslopt=tls, enable_multithread=False, fire_cont_frame=False, skip_utf8_validation=True
        )
        self._ws.settimeout(CONNECT_TIMEOUT)
        try:
            self._backend.call_blocking(self._ws.connect, self._url, **self._options())
        except websocket.WebSocketBadStatusException as error:
            wish = _retry_after(error.resp_headers)
            raise close_codes.refused(
                error.status_code, "the WebSocket upgrade was refused", wish
            ) from None
        except (websocket.WebSocketException, OSError, ValueError) as error:
            status = self._ws.getstatus()
            if status is not None:  # the library lets redirects, and only those, pass for a success
                raise close_codes.refused(
                    status, "a redirect: set Z4J_BRAIN_URL to where it leads"
                ) from None
            raise NetworkError(f"cannot reach the brain: {short(error)}") from None
        self._ws.sock = CooperativeSocket(
            self._ws.sock, self._backend, CONNECT_TIMEOUT, SEND_TIMEOUT
        )
        self._ws.lock = self._backend.lock()
        self._ws.frame_buffer.recv_strict = _bounded(self._ws.frame_buffer.recv_strict)
        # Its answer to a close frame may meet a socket that is gone, and that error would hide the code; ``abort`` answers.
        self._ws.send_close = lambda *_args, **_options: None
        self._heard = self._backend.now()

    def send(self, build: Callable[[], bytes]) -> int:
        """Build and write one binary frame under one lock."""
        import websocket

        with self._order:
            frame = build()
            self._sending = True
            try:
                self._open().send_frame(BinaryFrame(frame))
            except (websocket.WebSocketException, OSError) as error:
                raise NetworkError(f"the line broke while sending: {short(error)}") from None
            finally:
                self._sending = False
        return len(frame)

    def receive(self, timeout: float) -> bytes | None:
        """Return the next data message; answers pings, and pings a brain that has gone quiet."""
        import websocket

        try:
            ws = self._open()
            ws.sock.settimeout(timeout)
            opcode, frame = ws.recv_data_frame(True)
        except websocket.WebSocketTimeoutException:
            return self._silence()
        except (websocket.WebSocketException, OSError, ValueError) as error:
            raise NetworkError(f"the line broke: {short(error)}") from None
        self._heard, self._pinged = self._backend.now(), False
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            raise close_error(frame.data)
        return (
            bytes(frame.data)
            if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY)
            else None
        )

    def abort(self) -> None:
        """Break the line from any task; not ``close()``, which hangs while a reader waits (``field-notes`` C.8).

        Says goodbye if the socket takes it at once and nobody is in the middle of a frame. Does nothing in a forked child:
        the line is its parent's.
        """
        sock = getattr(self._ws, "sock", None)
        if sock is None or self._backend.forked():
            return
        try:
            if (
                isinstance(sock, CooperativeSocket) and not self._sending
            ):  # it is a plain socket until the upgrade is through
                sock.offer(_goodbye())
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already gone, which is what was wanted

    def close(self) -> None:
        """Break the line, with a goodbye if the socket takes it at once, and release it."""
        self.abort()
        ws, self._ws = self._ws, None
        sock = getattr(ws, "sock", None)
        if sock is not None and not self._backend.forked():
            try:
                sock.close()
            except OSError:
                pass

    def _open(self) -> Any:
        if self._ws is None or self._ws.sock is None:
            raise NetworkError("the line is closed")
        return self._ws

    def _silence(self) -> bytes | None:
        quiet = self._backend.now() - self._heard
        if quiet > DEAD_AFTER:
            raise NetworkError(f"nothing heard from the brain for {quiet:.0f} s")
        if quiet > PING_AFTER and not self._pinged:
            self._pinged = True
            try:
                self._open().ping()
            except OSError as error:
                raise NetworkError(f"the line broke: {short(error)}") from None
        return None

    def _options(self) -> dict[str, Any]:
        return {
            "header": [f"Authorization: Bearer {self._token()}"],
            "suppress_origin": True,
            # The library would follow three, and take the Authorization header along to wherever they lead.
            "redirect_limit": 0,
        }


def close_error(data: bytes) -> AgentError:
    """Return the error for the body of a close frame: two bytes of code, then the reason."""
    code = struct.unpack("!H", data[:2])[0] if len(data) >= 2 else None  # noqa: PLR2004 - RFC 6455, 5.5.1
    return close_codes.closed(code, printable(data[2:].decode(errors="replace")))


def preload() -> None:
    """Import the library now: a fifth of a second that belongs to the host's start, not on its hub later."""
    import websocket  # noqa: F401


def _goodbye() -> bytes:
    from websocket import ABNF

    return bytes(ABNF.create_frame(struct.pack("!H", NORMAL), ABNF.OPCODE_CLOSE).format())


def _bounded(read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Refuse a frame that announces more than ``LONGEST``: the library would wait for all of it and hear nothing else."""

    def bounded(size: int) -> bytes:
        if size > LONGEST:
            raise ValueError(f"a frame of {size} bytes")
        return read(size)

    return bounded


def _retry_after(headers: Mapping[str, str] | None) -> float | None:
    """Return the seconds of a ``Retry-After``; the form with a date is rare and counts as absent."""
    text = (headers or {}).get("retry-after", "")
    return float(text) if text.isdecimal() else None
