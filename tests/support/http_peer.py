"""A scripted HTTP brain: the long-poll routes, the health route, and misbehaviour on request.

It runs in the process under test, on the same backend, and is guarded against forks as
:mod:`tests.support.peer` is. The HTTP is written by hand::

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

from tests.support.listener import GoneError, Listener, push, shut, some
from tests.support.peer import AGENT, PROJECT, SECRET, TOKEN
from z4j_bare.errors import ForkedChildError


class Nonce:
    """One long-poll session: its verifier, its signer, and the verified frames."""

    def __init__(self, secret, nonce):
        binding = {"secret": secret, "agent_id": AGENT, "project_id": PROJECT, "session_id": nonce}
        self.signer = FrameSigner(**binding)
        self.verifier = FrameVerifier(**binding)
        self.frames = []
        self.dead = False
        self.posts_die = False
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
    """The listener and its script. ``mishaps`` holds the errors of the agent."""

    def __init__(self, backend, *, secret=SECRET, token=TOKEN, tls=None):
        self.backend = backend
        self.secret = secret
        self.token = token
        self.body_limit = 1_048_576
        self.answers = {}
        self.requests = []
        self.sessions = {}
        self.commands = []
        self.mishaps = []
        self.post_seconds = 0.0
        self.drop_posts = 0
        self.door = Listener(backend, self.serve, name="http-peer", tls=tls)
        self.port, self.url = self.door.port, self.door.url

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
        self.door.stop()

    def hang_up(self):
        """Shut down every connection."""
        self.door.hang_up()

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
        self.mishaps.append(f"{request.method} {request.path}")
        return 404, {}, b"{}"

    def _commands(self, request):
        wait, most = float(request.query["wait"]), int(request.query["max_frames"])
        ids = {"X-Z4J-Agent-Id": AGENT, "X-Z4J-Project-Id": PROJECT}
        if most == 0:
            self.sessions[request.nonce] = Nonce(self.secret, request.nonce)
            return 200, ids, b'{"frames":[]}'
        session = self.sessions.get(request.nonce)
        if session is None or session.dead:
            return (
                409,
                {},
                b'{"detail":"long-poll session invalidated; reconnect with a fresh session nonce"}',
            )
        session.polling += 1
        if session.polling > 1:
            self.mishaps.append("two polls at once")
        try:
            self._wait(wait, lambda: self.commands)
        finally:
            session.polling -= 1
        ready, self.commands = self.commands[:most], self.commands[most:]
        frames = [session.signer.sign_and_serialize(frame) for frame in ready]
        return (
            200,
            ids,
            json.dumps(
                {
                    "frames": [
                        frame.decode() if isinstance(frame, bytes) else frame for frame in frames
                    ]
                }
            ).encode(),
        )

    def _wait(self, seconds, ready=lambda: False):
        """Yield once, to expose concurrent requests; then wait for ``ready()`` or the timeout."""
        self.backend.sleep(0)
        until = self.backend.now() + seconds
        while not ready() and self.backend.now() < until and not self.door.stopped:
            self.backend.sleep(0.02)

    def _events(self, request):
        session = self.sessions.get(request.nonce)
        if session is None or session.dead or session.posts_die:
            return (
                409,
                {},
                b'{"detail":"long-poll session invalidated; reconnect with a fresh session nonce"}',
            )
        session.posting += 1
        if session.posting > 1:
            self.mishaps.append("two uploads at once")
        try:
            self._wait(self.post_seconds)
            frames = json.loads(request.body)["frames"]
            for text in frames:
                session.frames.append(session.verifier.parse_and_verify(text.encode()))
        except SignatureError as error:
            session.dead = True
            self.mishaps.append(error)
            return (
                409,
                {},
                b'{"detail":"long-poll session invalidated; reconnect with a fresh session nonce"}',
            )
        finally:
            session.posting -= 1
        return (
            200,
            {},
            json.dumps(
                {"accepted": len(frames), "rejected": 0, "errors": [], "error_code": None}
            ).encode(),
        )

    def serve(self, sock, ahead=b""):
        """Serve a connection, of which the bytes ``ahead`` have been read."""
        try:
            sock = self.door.secured(sock)
            self._converse(sock, ahead)
        except ForkedChildError:
            raise
        except (GoneError, OSError):
            pass
        except Exception as error:
            self.mishaps.append(error)
        finally:
            if not self.backend.forked():
                sock.close()

    def _converse(self, sock, ahead):
        while not self.door.stopped:
            while b"\r\n\r\n" not in ahead:
                ahead += some(self.backend, sock)
            head, ahead = ahead.split(b"\r\n\r\n", 1)
            line, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = line.split()
            headers = {
                name.lower(): value.strip()
                for name, _, value in (each.partition(":") for each in lines)
            }
            size = int(headers.get("content-length", 0))
            while len(ahead) < size:
                ahead += some(self.backend, sock)
            body, ahead = ahead[:size], ahead[size:]
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
            push(self.backend, sock, f"HTTP/1.1 {status} Scripted\r\n{text}\r\n".encode() + content)


class Tunnel:
    """A forward proxy for CONNECT only. ``heads`` holds the requests."""

    def __init__(self, backend):
        self.backend = backend
        self.heads = []
        self.door = Listener(backend, self._join, name="tunnel")
        self.port = self.door.port

    def stop(self):
        """Disconnect and stop listening."""
        self.door.stop()

    def _join(self, sock):
        head = b""
        try:
            with sock:
                while b"\r\n\r\n" not in head:
                    head += some(self.backend, sock)
                self.heads.append(head.decode())
                host, port = head.split()[1].decode().split(":")
                with socket.create_connection((host, int(port))) as inner:
                    inner.settimeout(0)
                    self.door.socks.append(inner)
                    sock.send(b"HTTP/1.1 200 Established\r\n\r\n")
                    join(self.backend, sock, inner)
        except (GoneError, OSError):
            pass


def join(backend, outer, inner, pieces=None):
    """Copy in both directions until one ends; read at most ``pieces`` times from ``inner``."""
    back = backend.spawn(_pump, backend, inner, outer, pieces, name="pump")
    _pump(backend, outer, inner)
    back.join(5)


def _pump(backend, source, target, pieces=None):
    """Copy until the end or for ``pieces`` reads; then shut down both sockets."""
    try:
        while pieces is None or pieces > 0:
            push(backend, target, some(backend, source))
            pieces = None if pieces is None else pieces - 1
    except (GoneError, OSError):
        pass
    shut(source)
    shut(target)
