"""A scripted brain that serves WebSocket and HTTP on one address, with or without TLS.

``brain.http`` and ``brain.ws`` are the two peers. ``brain.blocks = 403`` rejects each upgrade with
that status, as a proxy that blocks WebSocket does.
"""

from tests.support.http_peer import HttpPeer
from tests.support.listener import GoneError, Listener, recv_some, send_all
from tests.support.peer import SECRET, TOKEN, Peer


class CombinedPeer:
    """One listener and the two peers behind it."""

    def __init__(self, backend, *, secret=SECRET, token=TOKEN, tls=None):
        self.backend = backend
        self.blocks = None
        self.ws = Peer(backend, secret=secret, token=token)
        self.http = HttpPeer(backend, secret=secret, token=token)
        self.listener = Listener(backend, self._serve, name="combined-peer", tls=tls)
        self.url = self.listener.url

    def stop(self):
        """Disconnect all sessions and stop listening."""
        for listener in (self.ws.listener, self.http.listener):
            listener.stopped = True  # the three listeners then stop in parallel
        for part in (self.listener, self.ws, self.http):
            part.stop()

    def _serve(self, sock):
        head = b""
        try:
            sock = self.listener.wrap_tls(sock)
            while b"\r\n\r\n" not in head:
                head += recv_some(self.backend, sock)
            if b"upgrade: websocket" not in head.lower():
                self.http.serve(sock, head)
            elif self.blocks is None:
                self.ws.serve(sock, head)
            else:
                send_all(
                    self.backend,
                    sock,
                    b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    % self.blocks,
                )
        except (GoneError, OSError):
            pass
        finally:
            sock.close()
