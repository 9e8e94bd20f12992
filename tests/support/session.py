"""A session in virtual time: the agent's loops, a store in memory, and a recording transport."""

import json
from collections import deque

from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.memory import MemoryStore
from z4j_bare.concurrency.fake import FakeConcurrency
from z4j_bare.errors import AgentError, LocalStorageError, NetworkError
from z4j_bare.monitoring.metrics import Counters
from z4j_bare.pipeline.send import Sender
from z4j_bare.pipeline.session import Connection
from z4j_bare.wire.session import HelloAck, Session

SECRET = bytes(range(32))
HELLO_ACK = HelloAck("agent", "project", "session")


class FakeTransport:
    """An ``ITransport`` that records ``(time, frame)`` in ``sent`` and receives from ``inbox``.

    An exception in ``inbox``, ``hello_answer`` or ``send_error`` is raised.
    """

    name = "fake"
    synchronous_acks = False

    def __init__(self, backend):
        self.sent = []
        self.inbox = deque()
        self.send_error = None
        self.aborted = False
        self.closed = False
        self.hello_answer = b""
        self.hellos = []
        self.on_frame = lambda frame: None
        self._backend = backend

    def connect(self, hello):
        self.hellos.append(hello)
        if isinstance(self.hello_answer, BaseException):
            raise self.hello_answer
        return self.hello_answer

    def send(self, build):
        if self.send_error is not None:
            raise self.send_error
        message = build()
        frame = json.loads(message)
        self.sent.append((self._backend.now(), frame))
        self.on_frame(frame)
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

    def frames(self, kind):
        """Return the sent frames of one type, in order."""
        return [frame for _, frame in self.sent if frame["type"] == kind]

    def event_numbers(self):
        """Return the numbers of the sent events, in order, repetitions included."""
        batches = self.frames("event_batch")
        return [event["n"] for frame in batches for event in frame["payload"]["events"]]


class FailingDisk:
    """A store that keeps its rows after ``close``, and fails while ``full`` is set."""

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


class SessionHarness:
    """A backend, a disk, a buffer manager, a sender, and the connection of one session."""

    def __init__(self, hello_ack=HELLO_ACK):
        self.backend = FakeConcurrency()
        self.disk = FailingDisk()
        self.buffer = BufferManager(self.disk.open, self.backend)
        self.counters = Counters()
        self.sender = Sender(self.buffer, self.backend, self.counters)
        self.rows_stored = 0
        self.acked_frames = 0
        self.reconnect(hello_ack)

    def reconnect(self, hello_ack=HELLO_ACK):
        """Replace the connection by a new one on a new transport."""
        self.transport = FakeTransport(self.backend)
        session = Session(hello_ack, SECRET)
        self.connection = Connection(self.transport, session, self.backend)
        self.acked_frames = 0

    def start_sender(self):
        """Run the sender on the current connection."""
        self.sender_task = self.backend.spawn(self.sender.run, self.connection, name="z4j-send")

    def end_session(self, seconds=1.0):
        """Close the connection and let its loops end."""
        self.connection.close()
        self.backend.advance(seconds)

    def start_session(self):
        """Open the next connection and run the sender on it."""
        self.reconnect()
        self.start_sender()

    def store(self, count, *, size=0, kind="event", wake=True):
        """Store numbered rows; with ``wake`` also wake the sender."""
        rows = []
        for _ in range(count):
            fields = {"n": self.rows_stored, "x": "x" * size}
            payload = json.dumps(fields, separators=(",", ":")).encode()
            rows.append((kind, f"c-{self.rows_stored}", payload))
            self.rows_stored += 1
        self.buffer.append(rows)
        if wake:
            self.connection.wake.set()

    def ack(self, count=1):
        """Acknowledge the oldest frames of this session that are not acknowledged."""
        for _ in range(count):
            self.sender.on_ack(self.transport.frames("event_batch")[self.acked_frames]["id"])
            self.acked_frames += 1

    def ack_immediately(self):
        """Acknowledge every frame of this session before its send returns."""
        self.transport.on_frame = lambda frame: (
            frame["type"] == "event_batch" and self.sender.on_ack(frame["id"])
        )

    def buffered(self):
        """Return the number of rows in the buffer."""
        return self.buffer.stats().rows

    def run_loop(self, run):
        """Run a loop in a task; return a list to which its error, or ``None``, is appended."""
        ended = []

        def work():
            try:
                run()
            except AgentError as error:
                ended.append(error)
            else:
                ended.append(None)

        self.backend.spawn(work, name="loop")
        return ended
