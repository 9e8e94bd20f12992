"""A scripted brain that serves WebSocket and HTTP on one address, with or without TLS.

``front.http`` and ``front.ws`` are the two peers. ``front.blocks = 403`` answers each upgrade with
that status, as a proxy that blocks WebSocket does.
"""

from tests.support.http_peer import HttpPeer
from tests.support.listener import GoneError, Listener, push, some
from tests.support.peer import SECRET, TOKEN, Peer


class Front:
    """One listener and the two peers behind it."""

    def __init__(self, backend, *, secret=SECRET, token=TOKEN, tls=None):
        self.backend = backend
        self.blocks = None
        self.ws = Peer(backend, secret=secret, token=token)
        self.http = HttpPeer(backend, secret=secret, token=token)
        self.door = Listener(backend, self._meet, name="front", tls=tls)
        self.url = self.door.url

    def stop(self):
        """Disconnect all sessions and stop listening."""
        for door in (self.ws.door, self.http.door):
            door.stopped = True  # the three listeners then stop in parallel
        for part in (self.door, self.ws, self.http):
            part.stop()

    def _meet(self, sock):
        head = b""
        try:
            sock = self.door.secured(sock)
            while b"\r\n\r\n" not in head:
                head += some(self.backend, sock)
            if b"upgrade: websocket" not in head.lower():
                self.http.serve(sock, head)
            elif self.blocks is None:
                self.ws.meet(sock, head)
            else:
                push(
                    self.backend,
                    sock,
                    b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    % self.blocks,
                )
        except (GoneError, OSError):
            pass
        finally:
            sock.close()
