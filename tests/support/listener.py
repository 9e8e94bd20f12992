"""A loopback listener for scripted peers, and blocking-style socket calls on the backend."""

import os
import socket
import ssl
from contextlib import suppress
from functools import partial


class GoneError(Exception):
    """The agent disconnected."""


class Listener:
    """Runs ``serve(sock)`` in a task for each connection until it is stopped.

    :param tls: an ``ssl.SSLContext`` for :meth:`secured`; it also makes ``url`` an ``https`` one.
    """

    def __init__(self, backend, serve, *, name, tls=None):
        self.backend = backend
        self.stopped = False
        self.socks = []
        self._serve = serve
        self._name = name
        self._tls = tls
        self._pid = os.getpid()
        self._tasks = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self.spawn(self._accept)

    def spawn(self, function, *args):
        """Run a task that ``stop`` waits for."""
        self._tasks.append(self.backend.spawn(function, *args, name=self._name))

    def secured(self, sock):
        """Return the socket, wrapped in TLS if the listener has a context."""
        if self._tls is None:
            return sock
        wrapped = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        wrapped.setblocking(False)
        self.socks[self.socks.index(sock)] = wrapped
        try:
            retry_when_ready(self.backend, wrapped, wrapped.do_handshake)
        except Exception:  # including the errors of a socket that was shut down meanwhile
            wrapped.close()
            raise
        return wrapped

    def hang_up(self):
        """Shut down every connection."""
        for sock in self.socks:
            shut(sock)

    def stop(self):
        """Disconnect and stop listening. Does nothing in a forked child, which has copies."""
        if os.getpid() != self._pid:
            return
        self.stopped = True
        self.hang_up()
        with suppress(OSError):
            # Wakes the accept loop, which then sees ``stopped``.
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        for task in self._tasks:
            task.join(5)
        for sock in (*self.socks, self._listener):
            sock.close()

    def _accept(self):
        while not self.stopped:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                self.backend.wait_readable(self._listener, 0.1)
                continue
            sock.settimeout(0)
            self.socks.append(sock)
            self.spawn(self._serve, sock)


def retry_when_ready(backend, sock, action, *, write=False):
    """Call ``action`` until the socket, plain or TLS, is ready; ``write`` waits to write."""
    while True:
        try:
            return action()
        except BlockingIOError:
            for_write = write
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            for_write = isinstance(error, ssl.SSLWantWriteError)
        wait = backend.wait_writable if for_write else backend.wait_readable
        wait(sock, 1.0)


def some(backend, sock):
    """Wait for bytes and return them. Raises ``GoneError`` at the end of the stream."""
    data = retry_when_ready(backend, sock, lambda: sock.recv(65536))
    if not data:
        raise GoneError
    return data


def push(backend, sock, data):
    """Write all of ``data``."""
    while data:
        data = data[retry_when_ready(backend, sock, partial(sock.send, data), write=True) :]


def shut(sock):
    """Shut down both directions of a socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
