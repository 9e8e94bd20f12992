"""A TCP proxy between agent and brain, on native threads, and the network faults it can inject::

    proxy = Proxy(brain.port)
    with proxy.poisoned(Latency(0.2)):
        ...                             # every connection is affected, also new ones
    proxy.close()

Delayed bytes are delivered later, as TCP does: only a dead or reset connection loses bytes. For
processes without patched sockets.
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
    """A fault while it is active; this one does nothing. ``hits`` counts its effects."""

    def __init__(self):
        self.hits = 0

    def admit(self, line):
        """Apply to a connection, open since before the fault (``line.old``) or new."""

    def carry(self, data, *, down):
        """Yield what is delivered of ``data``, ``down`` to the agent or up to the brain."""
        del down
        yield data


class Latency(Toxic):
    """Delays all data by ``seconds``."""

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds

    def carry(self, data, *, down):
        del down
        time.sleep(self._seconds)
        self.hits += 1
        yield data


class Bandwidth(Toxic):
    """Delivers at most ``rate`` bytes per second."""

    def __init__(self, rate):
        super().__init__()
        self._rate = rate

    def carry(self, data, *, down):
        del down
        size = max(1, self._rate // 20)
        for start in range(0, len(data), size):
            time.sleep(0.05)
            self.hits += 1
            yield data[start : start + size]


class Fragmentation(Toxic):
    """Delivers data in pieces of a few bytes."""

    def carry(self, data, *, down):
        del down
        while data:
            size = random.randint(1, 200)
            self.hits += 1
            yield data[:size]
            data = data[size:]
            time.sleep(0.0002)


class HalfOpen(Toxic):
    """Open connections silently stop to deliver for good; new ones work."""

    def admit(self, line):
        if line.old:
            line.dead = True
            self.hits += 1


class BlackHole(Toxic):
    """Delivers nothing on any connection; connecting works."""

    def admit(self, line):
        line.paused = True
        self.hits += 1


class Reset(Toxic):
    """Resets open connections at once, and new ones after their first bytes."""

    def admit(self, line):
        line.reset = line.old

    def carry(self, data, *, down):
        del data, down
        self.hits += 1
        raise ConnectionResetError
        yield


class Garbage(Toxic):
    """Replaces the brain's bytes (``down``) or the agent's by random ones."""

    def __init__(self, *, down):
        super().__init__()
        self._down = down

    def carry(self, data, *, down):
        if down is self._down:
            self.hits += 1
            data = os.urandom(len(data))
        yield data


class Refused(Toxic):
    """Refuses new connections and resets open ones."""

    def admit(self, line):
        line.reset = True
        self.hits += 1


class ProxyConnection(threading.Thread):
    """A connection of the agent and its counterpart to the brain."""

    def __init__(self, proxy, sock):
        super().__init__(name="toxic-line", daemon=True)
        self.old = False
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
            self._pass()
        except OSError:
            self._reset_on_close()
        finally:
            self._proxy.lines.discard(self)
            for sock in filter(None, (self._agent, self._brain)):
                sock.close()

    def _pass(self):
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
                    self._carry(data, sock)
                else:
                    return

    def _carry(self, data, source):
        for piece in self._proxy.toxic.carry(data, down=source is self._brain):
            (self._agent if source is self._brain else self._brain).sendall(piece)

    def _reset_on_close(self):
        """Make the following close of both sockets send RST."""
        for sock in filter(None, (self._agent, self._brain)):
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Proxy:
    """Listens on ``port`` and forwards to ``target``, a port of 127.0.0.1."""

    def __init__(self, target):
        self.target = target
        self.toxic = Toxic()
        self.lines = set()
        self.closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, name="toxic-accept", daemon=True).start()

    @contextmanager
    def poisoned(self, toxic):
        """Activate ``toxic`` for the ``with`` block; delayed data is delivered afterwards."""
        self.toxic = toxic
        for line in list(self.lines):
            line.old = True
            toxic.admit(line)
        try:
            yield toxic
        finally:
            self.toxic = Toxic()
            for line in list(self.lines):
                line.paused = False

    def close(self):
        """Disconnect and stop listening."""
        self.closed = True

    def _accept(self):
        while not self.closed:
            if isinstance(self.toxic, Refused):
                self._refuse_connections()
            elif select.select([self._listener], [], [], POLL_INTERVAL)[0]:
                sock, _ = self._listener.accept()
                line = ProxyConnection(self, sock)
                self.lines.add(line)
                self.toxic.admit(line)
                line.start()
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
