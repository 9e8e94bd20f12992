"""A fixed sequence of calls on a store that can be stopped before any SQL statement.

``python -m tests.support.store_scenario`` loads the package once and forks a process for each run,
because the start of an interpreter takes longer than the run. A request is a line ``path call
statement``. The process stops before that statement of that call, writes ``pid transactions``, and
waits until it is killed. Then the server writes its exit code.
"""

import os
import signal
import sys

from z4j_bare.buffer import BufferStore
from z4j_bare.buffer.rows import KINDS

CYCLES = 6
MAX_ROWS = 40


def open_store(path, **options):
    """Return a small store that evicts and checkpoints its log at nearly every commit."""
    return BufferStore(path, max_rows=MAX_ROWS, max_bytes=1 << 20, clock=lambda: 2.0, **options)


def calls(store):
    """Yield ``(name, call)``: append, send, ack, delete and the other calls, in several cycles."""
    sent = []
    for cycle in range(CYCLES):
        kinds = ("event", "event", "result")
        rows = [(kinds[n % 3], f"t{n}", b"%d-%d" % (cycle, n) + bytes(700)) for n in range(24)]
        yield "append", lambda rows=rows: store.append(rows)
        together = [b"%d-e%d" % (cycle, n) + bytes(700) for n in range(12)]
        yield "append", lambda together=together: store.append_events(together)
        yield (
            "send",
            lambda: sent.extend(
                store.drain(sent[-1].id if sent else 0, 20, 1 << 20, ("event", "result"))
            ),
        )
        yield "ack", lambda: None
        yield "delete", lambda: store.confirm([entry.id for entry in sent[-20:-6]])
        yield "discard", lambda: store.discard([entry.id for entry in sent[-6:-4]], "rejected")
        yield (
            "increment_attempts",
            lambda: store.increment_attempts([entry.id for entry in sent[-4:-2]]),
        )
        yield "claim", lambda cycle=cycle: store.claim(f"c{cycle}", 1.0, b"provisional")
        yield "settle", lambda cycle=cycle: store.settle(f"c{cycle}", b"%d" % cycle, 1.0)
        yield "answer", lambda cycle=cycle: store.settle_and_queue(f"a{cycle}", b"%d" % cycle, 1.0)
        yield "vacuum_step", lambda: store.vacuum_step()


def state(store):
    """Return the contents of a store: rows, counters and commands."""
    stats = store.stats()
    rows = [
        (row.id, row.kind, row.payload, row.attempts)
        for row in store.drain(0, 10**6, 1 << 40, tuple(KINDS))
    ]
    ledger = store._connection.execute(
        "SELECT key, state, result FROM ledger ORDER BY seq"
    ).fetchall()
    return {
        "rows": rows,
        "produced": stats.produced,
        "confirmed": stats.confirmed,
        "lost": stats.lost,
        "ledger": ledger,
    }


class StatementCounter:
    """Counts statements and commits; calls ``reached`` before statement number ``stop``."""

    def __init__(self, store, stop=0, reached=None):
        self.statements = self.commits = 0
        self._stop = stop
        self._reached = reached
        store._connection.set_trace_callback(self._before)

    def _before(self, statement):
        self.statements += 1
        if self.statements == self._stop:
            self._reached(self)
        self.commits += statement == "COMMIT"


def run_until(path, stop_call, stop_statement):
    """Run up to a statement of a call, write ``pid transactions`` and wait until killed.

    :param stop_statement: the number of the statement; 0 means before the call.
    """

    def stop(watch):
        os.write(1, b"%d %d\n" % (os.getpid(), watch.commits if watch else 0))
        while True:
            signal.pause()

    store = open_store(path)
    for number, (_name, call) in enumerate(calls(store)):
        if number == stop_call and not stop_statement:
            stop(None)
        watch = StatementCounter(store, stop_statement, stop) if number == stop_call else None
        call()
        if watch:
            stop(watch)  # the call had fewer statements than ``stop_statement``


def serve():
    """Fork a process for each request on standard input."""
    for line in sys.stdin:
        path, call, statement = line.rsplit(" ", 2)
        child = os.fork()
        if not child:
            try:
                run_until(path, int(call), int(statement))
            finally:
                os._exit(1)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    serve()
