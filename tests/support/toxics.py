"""A TCP proxy between agent and brain, on native threads, and faults ("toxics") for it to inject::

    proxy = Proxy(brain.port)
    with proxy.inject(Latency(0.2)):
        ...                             # affects open and new connections
    proxy.close()

Delayed bytes are delivered later, as in TCP. Only a dead or reset connection loses bytes. The
proxy must run in a process without patched sockets.
"""

import os
import random
import select
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress

CHUNK = 65536

#: Seconds between two checks of a connection for a reset.
POLL_INTERVAL = 0.02


class Toxic:
    """Base class of the faults; has no effect itself. ``hits`` counts the effects of a fault."""

    def __init__(self):
        self.hits = 0

    def on_connection(self, connection):
        """Apply the fault to an open connection (``connection.open_before``) or to a new one."""

    def transform(self, data, *, down):
        """Yield the bytes to deliver in place of ``data``.

        :param down: whether ``data`` goes to the agent; otherwise it goes to the brain.
        """
        del down
        yield data


class Latency(Toxic):
    """Delays all data by ``seconds``."""

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds

    def transform(self, data, *, down):
        del down
        time.sleep(self._seconds)
        self.hits += 1
        yield data


class Bandwidth(Toxic):
    """Delivers at most ``rate`` bytes per second."""

    def __init__(self, rate):
        super().__init__()
        self._rate = rate

    def transform(self, data, *, down):
        del down
        size = max(1, self._rate // 20)
        for start in range(0, len(data), size):
            time.sleep(0.05)
            self.hits += 1
            yield data[start : start + size]


class Fragmentation(Toxic):
    """Delivers data in pieces of a few bytes."""

    def transform(self, data, *, down):
        del down
        while data:
            size = random.randint(1, 200)
            self.hits += 1
            yield data[:size]
            data = data[size:]
            time.sleep(0.0002)


class HalfOpen(Toxic):
    """Open connections deliver nothing any more, without a reset; new connections work."""

    def on_connection(self, connection):
        if connection.open_before:
            connection.dead = True
            self.hits += 1


class BlackHole(Toxic):
    """All connections deliver nothing while the fault is active; connecting works."""

    def on_connection(self, connection):
        connection.paused = True
        self.hits += 1


class Reset(Toxic):
    """Resets open connections at once, and new ones after their first bytes."""

    def on_connection(self, connection):
        connection.reset = connection.open_before

    def transform(self, data, *, down):
        del data, down
        self.hits += 1
        raise ConnectionResetError
        yield


class Garbage(Toxic):
    """Replaces the bytes to the agent (``down``) or those to the brain by random bytes."""

    def __init__(self, *, down):
        super().__init__()
        self._down = down

    def transform(self, data, *, down):
        if down is self._down:
            self.hits += 1
            data = os.urandom(len(data))
        yield data


class Refused(Toxic):
    """Refuses new connections and resets open ones."""

    def on_connection(self, connection):
        connection.reset = True
        self.hits += 1


class ProxyConnection(threading.Thread):
    """The proxy's two sockets for one connection: to the agent and to the brain."""

    def __init__(self, proxy, sock):
        super().__init__(name="toxic-connection", daemon=True)
        self.open_before = False
        self.paused = False
        self.dead = False
        self.reset = False
        self._proxy = proxy
        self._agent = sock
        self._brain = None

    def run(self):
        try:
            self._brain = socket.create_connection(("127.0.0.1", self._proxy.target))
            for sock in (self._agent, self._brain):
                sock.settimeout(10)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._relay()
        except OSError:
            self._reset_on_close()
        finally:
            self._proxy.connections.discard(self)
            for sock in filter(None, (self._agent, self._brain)):
                sock.close()

    def _relay(self):
        """Copy both directions until one ends or the connection is reset."""
        while not self._proxy.closed:
            if self.reset:
                raise ConnectionResetError
            if self.paused:
                time.sleep(POLL_INTERVAL)
                continue
            for sock in select.select([self._agent, self._brain], [], [], POLL_INTERVAL)[0]:
                data = sock.recv(CHUNK)
                if self.dead:
                    time.sleep(POLL_INTERVAL)  # a closed socket is always readable
                elif data:
                    self._forward(data, sock)
                else:
                    return

    def _forward(self, data, source):
        for piece in self._proxy.toxic.transform(data, down=source is self._brain):
            (self._agent if source is self._brain else self._brain).sendall(piece)

    def _reset_on_close(self):
        """Make ``close`` send a RST on both sockets."""
        for sock in filter(None, (self._agent, self._brain)):
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Proxy:
    """Listens on ``port`` of 127.0.0.1 and forwards to its port ``target``."""

    def __init__(self, target):
        self.target = target
        self.toxic = Toxic()
        self.connections = set()
        self.closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, name="toxic-accept", daemon=True).start()

    @contextmanager
    def inject(self, toxic):
        """Activate ``toxic`` for the ``with`` block; data that it holds back is sent afterwards."""
        self.toxic = toxic
        for connection in list(self.connections):
            connection.open_before = True
            toxic.on_connection(connection)
        try:
            yield toxic
        finally:
            self.toxic = Toxic()
            for connection in list(self.connections):
                connection.paused = False

    def close(self):
        """Disconnect and stop listening."""
        self.closed = True

    def _accept(self):
        while not self.closed:
            if isinstance(self.toxic, Refused):
                self._refuse_connections()
            elif select.select([self._listener], [], [], POLL_INTERVAL)[0]:
                sock, _ = self._listener.accept()
                connection = ProxyConnection(self, sock)
                self.connections.add(connection)
                self.toxic.on_connection(connection)
                connection.start()
        self._listener.close()

    def _refuse_connections(self):
        """Refuse connections, but keep the port bound so that no other socket gets it."""
        self._listener.close()
        with socket.socket() as buffer:
            buffer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            buffer.bind(("127.0.0.1", self.port))
            while isinstance(self.toxic, Refused) and not self.closed:
                time.sleep(POLL_INTERVAL)
        self._listener = socket.create_server(("127.0.0.1", self.port))
