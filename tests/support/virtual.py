"""One session in virtual time: the real loops between a store in memory and a transport that only remembers."""

import json
from collections import deque

from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import LocalStorageError, NetworkError
from z4j_bare.monitoring.metrics import Counters
from z4j_bare.pipeline.link import Connection
from z4j_bare.wire.session import HelloAck, Session

SECRET = bytes(range(32))
WELCOME = HelloAck("agent", "project", "session")


class FakeTransport:
    """An ``ITransport``: ``sent`` holds ``(when, frame)``, ``inbox`` what ``receive`` will return or raise."""

    name = "fake"
    synchronous_acks = False

    def __init__(self, backend):
        self.sent = []
        self.inbox = deque()
        self.broken = None
        self.aborted = False
        self.closed = False
        self.answer = b""
        self.hellos = []
        self.heard = lambda frame: None
        self._backend = backend

    def connect(self, hello):
        self.hellos.append(hello)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def send(self, build):
        if self.broken is not None:
            raise self.broken
        message = build()
        frame = json.loads(message)
        self.sent.append((self._backend.now(), frame))
        self.heard(frame)
        return len(message)

    def receive(self, timeout):
        self._backend.wait_until(lambda: self.inbox or self.aborted, timeout)
        if self.inbox:
            item = self.inbox.popleft()
            if isinstance(item, BaseException):
                raise item
            return item
        if self.aborted:
            raise NetworkError("aborted")
        return None

    def abort(self):
        self.aborted = True

    def close(self):
        self.closed = True

    def of(self, kind):
        """The frames of one type, in order."""
        return [frame for _, frame in self.sent if frame["type"] == kind]

    def events(self):
        """The events sent, in order, replays included."""
        return [
            event["n"] for frame in self.of("event_batch") for event in frame["payload"]["events"]
        ]


class Disk:
    """A store that outlives its openings and can be made to fail, as a disk does."""

    durable = True

    def __init__(self):
        self.store = MemoryStore(max_rows=100_000)
        self.full = False

    def open(self):
        if self.full:
            raise LocalStorageError("no space left on device")
        return self

    def __getattr__(self, name):
        method = getattr(self.store, name)

        def guarded(*args):
            if self.full and name != "cached_stats":
                raise LocalStorageError("no space left on device")
            return method(*args)

        return guarded


class World:
    """A backend, a disk, a keeper and the link of one session."""

    def __init__(self, hello_ack=WELCOME):
        self.backend = FakeConcurrency()
        self.disk = Disk()
        self.buffer = BufferManager(self.disk.open, self.backend)
        self.counters = Counters()
        self.stored = 0
        self.dial(hello_ack)

    def dial(self, hello_ack=WELCOME):
        """A new session on a new transport."""
        self.transport = FakeTransport(self.backend)
        self.link = Connection(self.transport, Session(hello_ack, SECRET), self.backend)

    def store(self, number, *, size=0, kind="event", wake=True):
        """Put numbered rows into the store."""
        rows = []
        for _ in range(number):
            rows.append(
                (
                    kind,
                    f"c-{self.stored}",
                    json.dumps({"n": self.stored, "x": "x" * size}, separators=(",", ":")).encode(),
                )
            )
            self.stored += 1
        self.buffer.append(rows)
        if wake:
            self.link.wake.set()
