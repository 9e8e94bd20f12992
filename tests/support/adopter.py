"""A manager on a real store in virtual time, which adopts the stores of dead processes."""

from z4j_bare.buffer import BufferStore, new_store_path
from z4j_bare.buffer.adopt_loop import AdoptLoop
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.buffer.recovery import Orphan
from z4j_bare.buffer.rows import KINDS
from z4j_bare.concurrency.fake import FakeConcurrency

ALL = tuple(KINDS)


class Adopter:
    """A manager on a real store in virtual time, with the adopt loop."""

    def __init__(self, home, claim_existing=None, **options):
        self.backend = FakeConcurrency()
        self.home = home
        self.store = None
        self.options = {"deployment": "p", **options}
        self.buffer = BufferManager(self.open, self.backend)
        self.woken = 0
        self.stop_event = self.backend.event()
        self.loop = AdoptLoop(
            str(home),
            self.claim,
            self.buffer,
            self.backend,
            self.wake,
            claim_existing=claim_existing,
        )
        self.task = None

    def open(self):
        self.store = BufferStore(new_store_path(self.home), **self.options)
        return self.store

    def claim(self, path):
        return Orphan(path, "p", max_rows=self.options.get("max_rows", 100_000), max_bytes=1 << 28)

    def wake(self):
        self.woken += 1

    def run(self, seconds=1.0):
        self.task = self.task or self.backend.spawn(
            self.loop.run, self.stop_event, name="z4j-adopt"
        )
        self.backend.advance(seconds)

    def rows(self):
        return (
            [entry.payload for entry in self.store.drain(0, 10**6, 1 << 40, ALL)]
            if self.store
            else []
        )

    def acknowledge(self, number):
        """Ack the oldest rows as the brain would."""
        ids = [entry.id for entry in self.store.drain(0, number, 1 << 40, ALL)]
        self.buffer.ack(ids, len(ids), self.buffer.generation)
        self.buffer.stats()

    def acknowledge_all(self):
        """Ack all rows, adopted ones too, until none is left; return their numbers in order."""
        rows = []
        while self.rows():
            rows += numbers(self.rows())
            self.acknowledge(5000)
            self.backend.advance(1)
        return rows

    def end(self):
        self.stop_event.set()
        self.backend.advance(1)
        if self.task is not None:
            assert not self.task.alive()
        self.buffer.close()


def numbers(rows):
    return [int(row) for row in rows]
