"""What every scripted peer stands on: a listener on loopback and patience with sockets, on the backend of the run."""

import os
import socket
import ssl
from contextlib import suppress
from functools import partial


class GoneError(Exception):
    """The agent hung up."""


class Listener:
    """Has ``serve(sock)`` run for each connection, in a task of its own, until it is stopped.

    :param tls: an ``ssl.SSLContext`` for :meth:`secured`; it also makes the ``url`` an ``https`` one.
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
        """Run a task that ``stop`` will wait for."""
        self._tasks.append(self.backend.spawn(function, *args, name=self._name))

    def secured(self, sock):
        """Return the socket as it is, or under TLS if that is spoken here."""
        if self._tls is None:
            return sock
        wrapped = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        wrapped.setblocking(False)
        self.socks[self.socks.index(sock)] = wrapped
        try:
            patiently(self.backend, wrapped, wrapped.do_handshake)
        except Exception:  # also what comes of a socket that is shut down meanwhile
            wrapped.close()
            raise
        return wrapped

    def hang_up(self):
        """Break every connection."""
        for sock in self.socks:
            shut(sock)

    def stop(self):
        """Hang up on everybody and stop listening; but not from a forked child, where all of it is the parent's."""
        if os.getpid() != self._pid:
            return
        self.stopped = True
        self.hang_up()
        with suppress(OSError):
            socket.create_connection(
                ("127.0.0.1", self.port), 1
            ).close()  # so that whoever accepts looks at once
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


def patiently(backend, sock, action, *, write=False):
    """Call ``action`` until the socket, plain or TLS, lets it: a ``write`` waits for room. Every wait guards against forks."""
    while True:
        try:
            return action()
        except BlockingIOError:
            room = write
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            room = isinstance(error, ssl.SSLWantWriteError)
        wait = backend.wait_writable if room else backend.wait_readable
        wait(sock, 1.0)


def some(backend, sock):
    """Read what there is, waiting for it. Raises ``GoneError`` at the end."""
    data = patiently(backend, sock, lambda: sock.recv(65536))
    if not data:
        raise GoneError
    return data


def push(backend, sock, data):
    """Write all of ``data``."""
    while data:
        data = data[patiently(backend, sock, partial(sock.send, data), write=True) :]


def shut(sock):
    """Break a socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
