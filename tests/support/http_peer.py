"""A scripted HTTP brain: the long-poll routes, the health route, and invalid responses on request.

It runs in the process under test, on the same backend. Like :mod:`tests.support.peer` it reads
nothing in a forked child. HTTP is implemented here, so that a test can send any response::

    peer = HttpPeer(backend)
    peer.body_limit = 8192
    peer.answers["POST"] = [(503, {"Retry-After": "7"}, b"{}")]  # the next responses to POST
    peer.sessions["nonce"].frames                                # the verified frames
    peer.command("retry_task", {"task_id": "t-1"})               # for the next poll
"""

import json
import socket
from email.utils import formatdate
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

from z4j_core.errors import SignatureError
from z4j_core.transport.frames import CommandFrame, CommandPayload
from z4j_core.transport.framing import FrameSigner, FrameVerifier

from tests.support.listener import GoneError, Listener, recv_some, send_all, shut_down
from tests.support.peer import AGENT, PROJECT, SECRET, TOKEN
from z4j_bare.errors import ForkedChildError

#: The response to a request of an invalidated session.
_INVALIDATED = (
    409,
    {},
    b'{"detail":"long-poll session invalidated; reconnect with a fresh session nonce"}',
)


class LongPollSession:
    """One long-poll session, identified by its nonce: signer, verifier, and verified frames.

    ``invalidated`` makes the peer reject its requests, ``reject_posts`` only its uploads.
    ``polling`` and ``posting`` count the requests in progress.
    """

    def __init__(self, secret, nonce):
        binding = {"secret": secret, "agent_id": AGENT, "project_id": PROJECT, "session_id": nonce}
        self.signer = FrameSigner(**binding)
        self.verifier = FrameVerifier(**binding)
        self.frames = []
        self.invalidated = False
        self.reject_posts = False
        self.polling = 0
        self.posting = 0


class Request:
    """One received request."""

    def __init__(self, method, target, headers, body):
        self.method = method
        self.path = urlsplit(target).path
        self.query = {name: values[0] for name, values in parse_qs(urlsplit(target).query).items()}
        self.headers = headers
        self.body = body
        self.nonce = headers.get("x-z4j-session-nonce", "")


class HttpPeer:
    """The listener, and the attributes that a test sets.

    ``errors`` holds the agent's violations of the protocol. ``post_delay`` is the duration of an
    upload in seconds. The next ``drop_posts`` uploads get no response.
    """

    def __init__(self, backend, *, secret=SECRET, token=TOKEN, tls=None):
        self.backend = backend
        self.secret = secret
        self.token = token
        self.body_limit = 1_048_576
        self.answers = {}
        self.requests = []
        self.sessions = {}
        self.commands = []
        self.errors = []
        self.post_delay = 0.0
        self.drop_posts = 0
        self.listener = Listener(backend, self.serve, name="http-peer", tls=tls)
        self.port, self.url = self.listener.port, self.listener.url

    # -- results and actions for tests

    def of(self, method):
        """Return the requests with one method, in order."""
        return [request for request in self.requests if request.method == method]

    def frames(self, kind):
        """Return the verified frames of one type, over all sessions."""
        return [
            frame
            for session in self.sessions.values()
            for frame in session.frames
            if frame.type == kind
        ]

    def events(self):
        """Return the received events, repeated ones included."""
        return [event for frame in self.frames("event_batch") for event in frame.payload.events]

    @property
    def polling(self):
        """The number of polls in progress, over all sessions."""
        return sum(session.polling for session in self.sessions.values())

    @property
    def posting(self):
        """The number of uploads in progress."""
        return sum(session.posting for session in self.sessions.values())

    def command(self, action, parameters=None, *, timeout=60, identity=None):
        """Queue a command for the next poll; return its id."""
        identity = identity or str(uuid4())
        payload = CommandPayload(
            action=action, target={}, parameters=parameters or {}, timeout_seconds=timeout
        )
        self.commands.append(CommandFrame(id=identity, payload=payload))
        return identity

    def stop(self):
        """Disconnect and stop listening."""
        self.listener.stop()

    # -- the peer's own behaviour

    def answer(self, request):
        """Return status, headers and body for a request."""
        scripted = self.answers.get(request.method)
        if scripted:
            return scripted.pop(0)
        if request.path == "/api/v1/health":
            return 200, {}, b'{"status":"ok"}'
        if request.path == "/ws/agent":
            return 404, {}, b'{"detail":"Not Found"}'
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return 401, {}, b'{"detail":"invalid agent token"}'
        if len(request.body) > self.body_limit:
            return 413, {}, b'{"error":"payload_too_large"}'
        if request.path == "/api/v1/agent/commands" and request.method == "GET":
            return self._commands(request)
        if request.path == "/api/v1/agent/events" and request.method == "POST":
            return self._events(request)
        self.errors.append(f"{request.method} {request.path}")
        return 404, {}, b"{}"

    def _commands(self, request):
        wait, max_frames = float(request.query["wait"]), int(request.query["max_frames"])
        ids = {"X-Z4J-Agent-Id": AGENT, "X-Z4J-Project-Id": PROJECT}
        if max_frames == 0:
            self.sessions[request.nonce] = LongPollSession(self.secret, request.nonce)
            return 200, ids, b'{"frames":[]}'
        session = self.sessions.get(request.nonce)
        if session is None or session.invalidated:
            return _INVALIDATED
        session.polling += 1
        if session.polling > 1:
            self.errors.append("two polls at once")
        try:
            self._wait(wait, lambda: self.commands)
        finally:
            session.polling -= 1
        ready, self.commands = self.commands[:max_frames], self.commands[max_frames:]
        frames = [session.signer.sign_and_serialize(frame) for frame in ready]
        texts = [frame.decode() if isinstance(frame, bytes) else frame for frame in frames]
        return 200, ids, json.dumps({"frames": texts}).encode()

    def _wait(self, seconds, ready=lambda: False):
        """Wait for ``ready()`` or the timeout. Yields at least once, to expose concurrency."""
        self.backend.sleep(0)
        until = self.backend.now() + seconds
        while not ready() and self.backend.now() < until and not self.listener.stopped:
            self.backend.sleep(0.02)

    def _events(self, request):
        session = self.sessions.get(request.nonce)
        if session is None or session.invalidated or session.reject_posts:
            return _INVALIDATED
        session.posting += 1
        if session.posting > 1:
            self.errors.append("two uploads at once")
        try:
            self._wait(self.post_delay)
            frames = json.loads(request.body)["frames"]
            for text in frames:
                session.frames.append(session.verifier.parse_and_verify(text.encode()))
        except SignatureError as error:
            session.invalidated = True
            self.errors.append(error)
            return _INVALIDATED
        finally:
            session.posting -= 1
        outcome = {"accepted": len(frames), "rejected": 0, "errors": [], "error_code": None}
        return 200, {}, json.dumps(outcome).encode()

    def serve(self, sock, received=b""):
        """Serve a connection from which the bytes ``received`` have already been read."""
        try:
            sock = self.listener.wrap_tls(sock)
            self._serve_requests(sock, received)
        except ForkedChildError:
            raise
        except (GoneError, OSError):
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            if not self.backend.forked():
                sock.close()

    def _serve_requests(self, sock, received):
        while not self.listener.stopped:
            while b"\r\n\r\n" not in received:
                received += recv_some(self.backend, sock)
            head, received = received.split(b"\r\n\r\n", 1)
            line, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = line.split()
            headers = {
                name.lower(): value.strip()
                for name, _, value in (each.partition(":") for each in lines)
            }
            size = int(headers.get("content-length", 0))
            while len(received) < size:
                received += recv_some(self.backend, sock)
            body, received = received[:size], received[size:]
            request = Request(method, target, headers, body)
            self.requests.append(request)
            if method == "POST" and self.drop_posts:
                self.drop_posts -= 1
                return
            status, extra, content = self.answer(request)
            extra = {
                "Date": formatdate(usegmt=True),
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                **extra,
            }
            text = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
            send_all(
                self.backend, sock, f"HTTP/1.1 {status} Scripted\r\n{text}\r\n".encode() + content
            )


class Tunnel:
    """A forward proxy for CONNECT only. ``heads`` holds the heads of the requests."""

    def __init__(self, backend):
        self.backend = backend
        self.heads = []
        self.listener = Listener(backend, self._serve, name="tunnel")
        self.port = self.listener.port

    def stop(self):
        """Disconnect and stop listening."""
        self.listener.stop()

    def _serve(self, sock):
        head = b""
        try:
            with sock:
                while b"\r\n\r\n" not in head:
                    head += recv_some(self.backend, sock)
                self.heads.append(head.decode())
                host, port = head.split()[1].decode().split(":")
                with socket.create_connection((host, int(port))) as inner:
                    inner.settimeout(0)
                    self.listener.socks.append(inner)
                    sock.send(b"HTTP/1.1 200 Established\r\n\r\n")
                    relay(self.backend, sock, inner)
        except (GoneError, OSError):
            pass


def relay(backend, outer, inner, pieces=None):
    """Copy in both directions until one ends; read at most ``pieces`` times from ``inner``."""
    back = backend.spawn(_copy, backend, inner, outer, pieces, name="relay")
    _copy(backend, outer, inner)
    back.join(5)


def _copy(backend, source, target, pieces=None):
    """Copy until the end or for ``pieces`` reads; then shut down both sockets."""
    try:
        while pieces is None or pieces > 0:
            send_all(backend, target, recv_some(backend, source))
            pieces = None if pieces is None else pieces - 1
    except (GoneError, OSError):
        pass
    shut_down(source)
    shut_down(target)
