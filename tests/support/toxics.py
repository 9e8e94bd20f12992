"""A TCP proxy on native threads between an agent and its brain, and what a network may do to what passes through it::

    proxy = Proxy(brain.port)
    with proxy.poisoned(Latency(0.2)):
        ...                             # every line suffers, the new ones too
    proxy.close()

What is held back is passed on later, as TCP would: only a line that is dead or torn loses bytes. For processes that are
not patched.
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

#: Seconds between two looks of a line at whether it has been torn.
LOOK = 0.02


class Toxic:
    """What happens to the lines while it lasts; by itself nothing. ``hits`` counts what it did."""

    def __init__(self):
        self.hits = 0

    def admit(self, line):
        """Take a line: one that stands when the trouble begins (``line.old``), or one that comes during it."""

    def carry(self, data, *, down):
        """Yield what becomes of ``data`` on its way ``down`` to the agent, or up to the brain."""
        del down
        yield data


class Latency(Toxic):
    """Everything takes ``seconds`` more."""

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds

    def carry(self, data, *, down):
        del down
        time.sleep(self._seconds)
        self.hits += 1
        yield data


class Bandwidth(Toxic):
    """No more than ``rate`` bytes a second get through."""

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


class TimeSlice(Toxic):
    """Everything comes in pieces of a few bytes."""

    def carry(self, data, *, down):
        del down
        while data:
            size = random.randint(1, 200)
            self.hits += 1
            yield data[:size]
            data = data[size:]
            time.sleep(0.0002)


class HalfOpen(Toxic):
    """The lines that stand go dead without a word, for good; new ones are well."""

    def admit(self, line):
        if line.old:
            line.dead = True
            self.hits += 1


class BlackHole(Toxic):
    """Nothing gets through, in neither direction, on no line; connecting still works."""

    def admit(self, line):
        line.held = True
        self.hits += 1


class Reset(Toxic):
    """Every line is torn down with RST, and the new ones after their first bytes."""

    def admit(self, line):
        line.torn = line.old

    def carry(self, data, *, down):
        del data, down
        self.hits += 1
        raise ConnectionResetError
        yield


class Garbage(Toxic):
    """Noise in place of what the brain says (``down``), or of what the agent says."""

    def __init__(self, *, down):
        super().__init__()
        self._down = down

    def carry(self, data, *, down):
        if down is self._down:
            self.hits += 1
            data = os.urandom(len(data))
        yield data


class Refused(Toxic):
    """Nobody listens, and the lines that stood are torn."""

    def admit(self, line):
        line.torn = True
        self.hits += 1


class CooperativeSocket(threading.Thread):
    """One connection and its other half."""

    def __init__(self, proxy, sock):
        super().__init__(name="toxic-line", daemon=True)
        self.old = False
        self.held = False
        self.dead = False
        self.torn = False
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
            self._tear()
        finally:
            self._proxy.lines.discard(self)
            for sock in filter(None, (self._agent, self._brain)):
                sock.close()

    def _pass(self):
        """Carry both directions until either ends, which ends the other, or the line is torn."""
        while not self._proxy.closed:
            if self.torn:
                raise ConnectionResetError
            if self.held:
                time.sleep(LOOK)
                continue
            for sock in select.select([self._agent, self._brain], [], [], LOOK)[0]:
                data = sock.recv(CHUNK)
                if self.dead:
                    time.sleep(LOOK)  # whoever has hung up is readable all the time
                elif data:
                    self._carry(data, sock)
                else:
                    return

    def _carry(self, data, source):
        for piece in self._proxy.toxic.carry(data, down=source is self._brain):
            (self._agent if source is self._brain else self._brain).sendall(piece)

    def _tear(self):
        """Have both ends see RST: the sockets are about to be closed."""
        for sock in filter(None, (self._agent, self._brain)):
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Proxy:
    """Listens on ``port``; what it lets through goes to ``target``, a port of 127.0.0.1."""

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
        """Have ``toxic`` rule for a while; what it held back goes on afterwards."""
        self.toxic = toxic
        for line in list(self.lines):
            line.old = True
            toxic.admit(line)
        try:
            yield toxic
        finally:
            self.toxic = Toxic()
            for line in list(self.lines):
                line.held = False

    def close(self):
        """Hang up on everybody and stop listening."""
        self.closed = True

    def _accept(self):
        while not self.closed:
            if isinstance(self.toxic, Refused):
                self._deaf()
            elif select.select([self._listener], [], [], LOOK)[0]:
                sock, _ = self._listener.accept()
                line = CooperativeSocket(self, sock)
                self.lines.add(line)
                self.toxic.admit(line)
                line.start()
        self._listener.close()

    def _deaf(self):
        """Refuse connections, but keep the port: anybody's next socket could take it."""
        self._listener.close()
        with socket.socket() as buffer:
            buffer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            buffer.bind(("127.0.0.1", self.port))
            while isinstance(self.toxic, Refused) and not self.closed:
                time.sleep(LOOK)
        self._listener = socket.create_server(("127.0.0.1", self.port))
