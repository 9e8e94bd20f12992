"""A loopback listener for scripted peers, and socket calls that wait through the backend."""

import os
import socket
import ssl
from contextlib import suppress
from functools import partial


class GoneError(Exception):
    """The agent disconnected."""


class Listener:
    """Runs ``serve(sock)`` in a task for each connection until it is stopped.

    :param tls: an ``ssl.SSLContext`` for :meth:`wrap_tls`; it also makes ``url`` an ``https`` one.
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

    def wrap_tls(self, sock):
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

    def disconnect_all(self):
        """Shut down every connection."""
        for sock in self.socks:
            shut_down(sock)

    def stop(self):
        """Disconnect all clients and stop listening. Does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        self.stopped = True
        self.disconnect_all()
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
    """Call ``action`` until it does not block, and return its result.

    :param sock: a plain or TLS socket.
    :param write: whether to wait until the socket is writable; otherwise until it is readable.
    """
    while True:
        try:
            return action()
        except BlockingIOError:
            for_write = write
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            for_write = isinstance(error, ssl.SSLWantWriteError)
        wait = backend.wait_writable if for_write else backend.wait_readable
        wait(sock, 1.0)


def recv_some(backend, sock):
    """Wait for data and return it. Raises ``GoneError`` at the end of the stream."""
    data = retry_when_ready(backend, sock, lambda: sock.recv(65536))
    if not data:
        raise GoneError
    return data


def send_all(backend, sock, data):
    """Write all of ``data``."""
    while data:
        data = data[retry_when_ready(backend, sock, partial(sock.send, data), write=True) :]


def shut_down(sock):
    """Shut down both directions of a socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
