"""A scripted WebSocket brain on loopback. A test can make it violate the protocol.

It signs and verifies with z4j_core. It runs in the process under test, on the same backend. Reads
go through the backend, because the copy of a task in a forked child must not read bytes that belong
to the parent. The WebSocket framing is implemented here, so that a test can send invalid frames::

    peer = Peer(backend)
    peer.acks = "none"                    # or "all", or the delay of each ack in seconds
    peer.upgrade_rejection = (503, {})    # status and headers of the response to upgrades, or None
    peer.raw_response = b"..."            # bytes to send in place of an HTTP response, or None
    peer.on_hello = lambda session: ...   # called after a hello; default: send the hello_ack
    peer.sessions[-1].command("retry_task", {"task_id": "t-1"})
"""

import base64
import hashlib
import json
import struct
from datetime import UTC, datetime
from uuid import uuid4

from z4j_core.errors import Z4JError
from z4j_core.transport.frames import (
    CommandFrame,
    CommandPayload,
    ErrorFrame,
    ErrorPayload,
    EventBatchAckFrame,
    EventBatchAckPayload,
    parse_frame,
)
from z4j_core.transport.framing import FrameSigner, FrameVerifier

from tests.support.listener import GoneError, Listener, recv_some, send_all, shut_down
from z4j_bare.errors import ForkedChildError

SECRET_TEXT = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
SECRET = base64.urlsafe_b64decode(SECRET_TEXT)
TOKEN = "z4j-token-that-nobody-may-log"
AGENT = "11111111-1111-4111-8111-111111111111"
PROJECT = "22222222-2222-4222-8222-222222222222"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class PeerSession:
    """One connection of an agent.

    ``frames`` holds the verified frames, and ``errors`` the agent's violations of the protocol.
    ``close_code`` is the code of the agent's close frame, or the text of a socket error. ``ended``
    is set when the connection has ended. While ``stalled`` is set, the peer reads nothing.
    """

    def __init__(self, peer, sock, received):
        self.peer = peer
        self.id = str(uuid4())
        self.path = ""
        self.headers = {}
        self.hello = None
        self.frames = []
        self.errors = []
        self.pings = 0
        self.pongs = 0
        self.close_code = None
        self.ended = False
        self.stalled = False
        self._sock = sock
        self._unread = received
        self._send_lock = peer.backend.lock()
        binding = {
            "secret": peer.secret,
            "agent_id": AGENT,
            "project_id": PROJECT,
            "session_id": self.id,
        }
        self.signer = FrameSigner(**binding)
        self.verifier = FrameVerifier(**binding)

    def of(self, kind):
        """Return the verified frames of one type."""
        return [frame for frame in self.frames if frame.type == kind]

    # -- actions for tests

    def command(
        self, action, parameters=None, *, target=None, timeout=60, token=None, identity=None
    ):
        """Send a signed command; return its id."""
        identity = identity or str(uuid4())
        payload = CommandPayload(
            action=action,
            target=target or {},
            parameters=parameters or {},
            timeout_seconds=timeout,
            delivery_claim_token=token,
        )
        self.send_signed(CommandFrame(id=identity, payload=payload))
        return identity

    def error(self, code, *, fatal):
        """Send a signed error frame."""
        self.send_signed(
            ErrorFrame(
                id="err_1", payload=ErrorPayload(code=code, message="as scripted", fatal=fatal)
            )
        )

    def ack(self, frame):
        """Acknowledge an event batch."""
        number = len(frame.payload.events)
        payload = EventBatchAckPayload(
            acked_id=frame.id, received=number, accepted=number, rejected=0
        )
        self.send_signed(EventBatchAckFrame(id=f"eba_{frame.id}"[:64], payload=payload))

    def signed(self, frame, signer=None):
        """Return the wire bytes of a frame, by default signed for this session; do not send."""
        with self._send_lock:
            return (signer or self.signer).sign_and_serialize(frame)

    def send_signed(self, frame):
        with self._send_lock:
            self._write(BINARY, self.signer.sign_and_serialize(frame))

    def send(self, data, opcode=BINARY):
        """Send a message, valid or not."""
        with self._send_lock:
            self._write(opcode, data)

    def send_raw(self, data):
        """Send bytes that need not be WebSocket frames."""
        with self._send_lock:
            self._send_bytes(data)

    def close(self, code, reason=""):
        """Send a close frame and disconnect."""
        self.send(struct.pack("!H", code) + reason.encode(), CLOSE)
        self.drop()

    def drop(self):
        """Disconnect without a close frame."""
        shut_down(self._sock)

    def hello_ack(self, **changes):
        """Send the hello_ack."""
        payload = {
            "protocol_version": "2",
            "brain_version": "1.13.0",
            "agent_id": AGENT,
            "project_id": PROJECT,
            "session_id": self.id,
            "heartbeat_interval_seconds": self.peer.heartbeat,
            "max_frame_size_bytes": self.peer.max_frame,
            **changes,
        }
        stamp = datetime.now(UTC).isoformat()
        self.send(
            json.dumps(
                {"v": 2, "type": "hello_ack", "id": "hack_1", "ts": stamp, "payload": payload}
            ).encode()
        )

    # -- the peer's own behaviour

    def run(self):
        try:
            self._sock = self.peer.listener.wrap_tls(self._sock)
            if self._upgrade():
                self._receive_frames()
        except ForkedChildError:
            raise
        except GoneError:
            pass
        except OSError as error:
            self.close_code = self.close_code or repr(error)
        except Exception as error:
            self.errors.append(error)
        finally:
            if not self.peer.backend.forked():
                self.ended = True
                self._sock.close()

    def _upgrade(self):
        head = self._unread
        while b"\r\n\r\n" not in head:
            head += self._read_some()
        head, self._unread = head.split(b"\r\n\r\n", 1)
        request, *lines = head.decode("latin-1").split("\r\n")
        self.path = request.split()[1]
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if self.peer.raw_response is not None:
            self._send_bytes(self.peer.raw_response)
            return False
        if "sec-websocket-key" not in self.headers:
            self.peer.sessions.remove(self)
            self.peer.requests.append(self)
            self._send_bytes(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return False
        if self.peer.upgrade_rejection is not None:
            status, headers = self.peer.upgrade_rejection
            extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self._send_bytes(
                f"HTTP/1.1 {status} No\r\n{extra}Content-Length: 0\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            return False
        accept = base64.b64encode(
            hashlib.sha1(self.headers["sec-websocket-key"].encode() + GUID).digest()
        )
        self._send_bytes(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        )
        self._send_bytes(b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        return True

    def _receive_frames(self):
        if self.headers.get("authorization") != f"Bearer {self.peer.token}":
            self.close(4401)
            return
        try:
            self.hello = parse_frame(self._read_message())
            assert self.hello.type == "hello"
        except (Z4JError, ValueError, AssertionError):
            self.close(4400)
            raise
        self.peer.on_hello(self)
        while True:
            message = self._read_message()
            frame = self.verifier.parse_and_verify(message)
            self.frames.append(frame)
            self.peer.on_frame(self, frame)

    def _read_message(self):
        """Return the next data message. Answers pings; raises ``GoneError`` for a close frame."""
        while True:
            head = self._read_exactly(2)
            if not head[1] & 0x80:
                raise AssertionError(f"a client's frames are masked; stray bytes {head!r}")
            if head[0] & 0x70:
                raise AssertionError(f"reserved bits set; stray bytes {head!r}")
            size = head[1] & 0x7F
            if size >= 126:
                size = int.from_bytes(self._read_exactly(2 if size == 126 else 8), "big")
            mask, data = self._read_exactly(4), self._read_exactly(size)
            data = _unmask(data, mask)
            opcode = head[0] & 0x0F
            if opcode in (TEXT, BINARY):
                return data
            if opcode == PING:
                self.pings += 1
                self.send(data, PONG)
            elif opcode == PONG:
                self.pongs += 1
            elif opcode == CLOSE:
                self.close_code = struct.unpack("!H", data[:2])[0] if data else 1005
                raise GoneError
            else:
                raise AssertionError(f"opcode {opcode}")

    def _read_exactly(self, size):
        while len(self._unread) < size:
            self._unread += self._read_some()
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def _read_some(self):
        while self.stalled and not self.peer.listener.stopped:
            self.peer.backend.sleep(0.02)
        return recv_some(self.peer.backend, self._sock)

    def _write(self, opcode, data):
        size = len(data)
        if size < 126:
            head = bytes((0x80 | opcode, size))
        elif size < 65536:
            head = bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
        else:
            head = bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")
        self._send_bytes(head + data)

    def _send_bytes(self, data):
        send_all(self.peer.backend, self._sock, data)


class Peer:
    """The listener, and the attributes that a test sets; see the module's docstring."""

    def __init__(self, backend, *, secret=SECRET, token=TOKEN, tls=None):
        self.backend = backend
        self.secret = secret
        self.token = token
        self.acks = "all"
        self.upgrade_rejection = None
        self.raw_response = None
        self.heartbeat = 10
        self.max_frame = 1_048_576
        self.on_hello = PeerSession.hello_ack
        self.sessions = []
        self.requests = []  # plain HTTP requests, answered with 404
        self.listener = Listener(backend, self.serve, name="peer", tls=tls)
        self.url = self.listener.url

    @property
    def live(self):
        """The sessions that have sent a hello and are open."""
        return [
            session for session in self.sessions if session.hello is not None and not session.ended
        ]

    @property
    def last(self):
        """The newest open session, or ``None``."""
        live = self.live
        return live[-1] if live else None

    @property
    def errors(self):
        """The agent's violations of the protocol, in all sessions."""
        return [error for session in self.sessions for error in session.errors]

    def frames(self, kind):
        """Return the verified frames of one type, over all sessions."""
        return [frame for session in self.sessions for frame in session.of(kind)]

    def events(self):
        """Return the received events of all sessions in order, repeated ones included."""
        return [event for frame in self.frames("event_batch") for event in frame.payload.events]

    def on_frame(self, session, frame):
        """Acknowledge an ``event_batch`` as configured by ``acks``."""
        if frame.type != "event_batch" or self.acks == "none":
            return
        if self.acks == "all":
            session.ack(frame)
        else:
            self.listener.spawn(self._ack_later, session, frame, self.acks)

    def stop(self):
        """Disconnect all sessions and stop listening."""
        self.listener.stop()

    def _ack_later(self, session, frame, seconds):
        self.backend.sleep(seconds)
        try:
            session.ack(frame)
        except OSError:
            pass

    def serve(self, sock, received=b""):
        """Serve a connection from which the bytes ``received`` have already been read."""
        session = PeerSession(self, sock, received)
        self.sessions.append(session)
        session.run()


def all_acked(runtime, number):
    """Return whether exactly ``number`` events were acknowledged and none is buffered."""
    runtime._agent.buffer.stats()
    stats = runtime.stats()
    return stats["acked"] == number and not stats["buffered"]


def _unmask(data, mask):
    if not data:
        return data
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")
