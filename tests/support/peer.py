"""A scripted WebSocket brain on loopback, which misbehaves on request.

It signs and verifies with z4j_core. It runs in the process under test, on the same backend. Every
read is guarded against forks: its copy in a forked child must not read bytes of the parent. The
WebSocket framing is written by hand, so that a test can send invalid frames::

    peer = Peer(backend)
    peer.acks = "none"                 # or "all", or the delay of each ack in seconds
    peer.refuse = (503, {})            # HTTP status and headers for the next upgrades, or None
    peer.noise = b"..."                # bytes to send in place of an HTTP response, or None
    peer.greet = lambda session: ...   # called after a hello; default: send the hello_ack
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

from tests.support.listener import GoneError, Listener, push, shut, some
from z4j_bare.errors import ForkedChildError

SECRET_TEXT = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
SECRET = base64.urlsafe_b64decode(SECRET_TEXT)
TOKEN = "z4j-token-that-nobody-may-log"
AGENT = "11111111-1111-4111-8111-111111111111"
PROJECT = "22222222-2222-4222-8222-222222222222"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class PeerSession:
    """One connection. ``frames`` holds the verified frames, ``mishaps`` errors of the agent."""

    def __init__(self, peer, sock, ahead):
        self.peer = peer
        self.id = str(uuid4())
        self.path = ""
        self.headers = {}
        self.hello = None
        self.frames = []
        self.mishaps = []
        self.pings = 0
        self.pongs = 0
        self.goodbye = None
        self.over = False
        self.stalled = False
        self._sock = sock
        self._ahead = ahead
        self._order = peer.backend.lock()
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
        """Return the frame's wire bytes without sending them."""
        with self._order:
            return (signer or self.signer).sign_and_serialize(frame)

    def send_signed(self, frame):
        with self._order:
            self._write(BINARY, self.signer.sign_and_serialize(frame))

    def send(self, data, opcode=BINARY):
        """Send a message, valid or not."""
        with self._order:
            self._write(opcode, data)

    def send_raw(self, data):
        """Send bytes that need not be WebSocket frames."""
        with self._order:
            self._push(data)

    def close(self, code, reason=""):
        """Send a close frame and disconnect."""
        self.send(struct.pack("!H", code) + reason.encode(), CLOSE)
        self.drop()

    def drop(self):
        """Disconnect without a close frame."""
        shut(self._sock)

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
            self._sock = self.peer.door.secured(self._sock)
            if self._upgrade():
                self._converse()
        except ForkedChildError:
            raise
        except GoneError:
            pass
        except OSError as error:
            self.goodbye = self.goodbye or repr(error)
        except Exception as error:
            self.mishaps.append(error)
        finally:
            if not self.peer.backend.forked():
                self.over = True
                self._sock.close()

    def _upgrade(self):
        head = self._ahead
        while b"\r\n\r\n" not in head:
            head += self._take_some()
        head, self._ahead = head.split(b"\r\n\r\n", 1)
        request, *lines = head.decode("latin-1").split("\r\n")
        self.path = request.split()[1]
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if self.peer.noise is not None:
            self._push(self.peer.noise)
            return False
        if "sec-websocket-key" not in self.headers:
            self.peer.sessions.remove(self)
            self.peer.requests.append(self)
            self._push(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return False
        if self.peer.refuse is not None:
            status, headers = self.peer.refuse
            extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self._push(
                f"HTTP/1.1 {status} No\r\n{extra}Content-Length: 0\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            return False
        accept = base64.b64encode(
            hashlib.sha1(self.headers["sec-websocket-key"].encode() + GUID).digest()
        )
        self._push(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        )
        self._push(b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        return True

    def _converse(self):
        if self.headers.get("authorization") != f"Bearer {self.peer.token}":
            self.close(4401)
            return
        try:
            self.hello = parse_frame(self._message())
            assert self.hello.type == "hello"
        except (Z4JError, ValueError, AssertionError):
            self.close(4400)
            raise
        self.peer.greet(self)
        while True:
            message = self._message()
            frame = self.verifier.parse_and_verify(message)
            self.frames.append(frame)
            self.peer.heard(self, frame)

    def _message(self):
        """Return the next data message; answers pings and records close codes."""
        while True:
            head = self._take(2)
            if not head[1] & 0x80:
                raise AssertionError(f"a client's frames are masked; stray bytes {head!r}")
            if head[0] & 0x70:
                raise AssertionError(f"reserved bits set; stray bytes {head!r}")
            size = head[1] & 0x7F
            if size >= 126:
                size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
            mask, data = self._take(4), self._take(size)
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
                self.goodbye = struct.unpack("!H", data[:2])[0] if data else 1005
                raise GoneError
            else:
                raise AssertionError(f"opcode {opcode}")

    def _take(self, size):
        while len(self._ahead) < size:
            self._ahead += self._take_some()
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def _take_some(self):
        while self.stalled and not self.peer.door.stopped:
            self.peer.backend.sleep(0.02)
        return some(self.peer.backend, self._sock)

    def _write(self, opcode, data):
        size = len(data)
        if size < 126:
            head = bytes((0x80 | opcode, size))
        elif size < 65536:
            head = bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
        else:
            head = bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")
        self._push(head + data)

    def _push(self, data):
        push(self.peer.backend, self._sock, data)


class Peer:
    """The listener and its script; see the module."""

    def __init__(self, backend, *, secret=SECRET, token=TOKEN, tls=None):
        self.backend = backend
        self.secret = secret
        self.token = token
        self.acks = "all"
        self.refuse = None
        self.noise = None
        self.heartbeat = 10
        self.max_frame = 1_048_576
        self.greet = PeerSession.hello_ack
        self.sessions = []
        self.requests = []  # plain HTTP requests, answered with 404
        self.door = Listener(backend, self.meet, name="peer", tls=tls)
        self.url = self.door.url

    @property
    def live(self):
        """The sessions that have sent a hello and are open."""
        return [
            session for session in self.sessions if session.hello is not None and not session.over
        ]

    @property
    def last(self):
        """The newest open session, or ``None``."""
        live = self.live
        return live[-1] if live else None

    @property
    def mishaps(self):
        """The agent's errors, over all sessions."""
        return [mishap for session in self.sessions for mishap in session.mishaps]

    def frames(self, kind):
        """Return the verified frames of one type, over all sessions."""
        return [frame for session in self.sessions for frame in session.of(kind)]

    def events(self):
        """Return the received events of all sessions in order, repeated ones included."""
        return [event for frame in self.frames("event_batch") for event in frame.payload.events]

    def heard(self, session, frame):
        """Respond to a frame as ``acks`` says."""
        if frame.type != "event_batch" or self.acks == "none":
            return
        if self.acks == "all":
            session.ack(frame)
        else:
            self.door.spawn(self._late, session, frame, self.acks)

    def stop(self):
        """Disconnect all sessions and stop listening."""
        self.door.stop()

    def _late(self, session, frame, seconds):
        self.backend.sleep(seconds)
        try:
            session.ack(frame)
        except OSError:
            pass

    def meet(self, sock, ahead=b""):
        """Serve a connection, of which the bytes ``ahead`` have been read."""
        session = PeerSession(self, sock, ahead)
        self.sessions.append(session)
        session.run()


def settled(runtime, number):
    """Return whether exactly ``number`` events were acknowledged and none is buffered."""
    runtime._agent.buffer.stats()
    stats = runtime.stats()
    return stats["acked"] == number and not stats["buffered"]


def _unmask(data, mask):
    if not data:
        return data
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(len(data), "big")
