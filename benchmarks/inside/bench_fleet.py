"""A fleet of light hosts, one process each, forked from one template that has imported everything.

``python bench_fleet.py BOARD`` reads one line of JSON from standard input: a list of hosts, each
with the fields of ``benchmarks.fleet.Plan``. The template forks a process for each host, prints
the pids, and waits for all. A host connects when the file ``connect`` exists, and ends when the
file ``stop`` exists. Both files lie beside ``BOARD``. The host publishes its numbers in ``BOARD``.
At its end the host writes its acks, sessions and costs to ``result.json`` in its home.

One process for each agent is closest to workers: each process has its own interpreter lock, and the
record lock of a buffer belongs to a process. The memory of the template is shared.
"""

import json
import logging
import os
import resource
import sys
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from z4j_core.models import Event, EventKind

import z4j_bare.agent
import z4j_bare.transport.longpoll  # noqa: F401 - all imports happen before the forks
from benchmarks.fleet import Board
from z4j_bare import install_agent
from z4j_bare.buffer.manager import BufferManager
from z4j_bare.transport.auto import TransportFactory

#: Seconds between two samples of a host.
SAMPLE_INTERVAL = 0.2


class Engine:
    """An engine without capabilities."""

    name = "celery"

    def capabilities(self):
        return set()


class Host:
    """One agent, and the events that it records."""

    def __init__(self, number, plan, board):
        self.plan = plan
        self.home = Path(plan["environment"]["Z4J_HOME"])
        self.acks = []
        self.delays = []
        self.sessions = []
        self._number = number
        self._board = board
        self._waiting = deque()
        self._produced = 0

    def run(self):
        """Record events and publish numbers until the file ``stop`` exists."""
        os.environ.update(self.plan["environment"])
        logging.basicConfig(filename=self.home / "host.log", level=logging.INFO)
        self._observe()
        self.runtime = install_agent(engines=[Engine()])
        for _ in range(self.plan["backlog"]):
            self._record()
        began = self._wait_for_connect()
        usage = _cpu()
        while not self._board.exists("stop"):
            elapsed = min(time.monotonic() - began, self.plan["seconds"])
            while self._produced < self.plan["backlog"] + int(elapsed * self.plan["rate"]):
                self._record()
            self._sample()
            time.sleep(SAMPLE_INTERVAL)
        seconds = time.monotonic() - began
        self._sample()
        result = {
            "produced": self._produced,
            "acks": self.acks,
            "delays": self.delays,
            "sessions": self.sessions,
            "cpu_ms_per_second": 1000 * (_cpu() - usage) / seconds,
            "pss_mb": _pss(),
            "stats": self.runtime.stats(),
        }
        self.runtime.stop()
        (self.home / "result.json").write_text(json.dumps(result, default=str))

    def _observe(self):
        """Delay connects until the file ``connect`` exists, and record the time of each ack."""
        create, ack = TransportFactory.create, BufferManager.ack
        host = self

        def create_later(factory):
            while not host._board.exists("connect"):
                time.sleep(0.02)
            return create(factory)

        def note(manager, ids, events, generation):
            now = time.monotonic()
            if events:
                host.acks.append((round(now, 3), events))
                for _ in range(min(events, len(host._waiting))):
                    host.delays.append(round(now - host._waiting.popleft(), 3))
            return ack(manager, ids, events, generation)

        TransportFactory.create, BufferManager.ack = create_later, note

    def _wait_for_connect(self):
        """Publish the backlog once it is stored, and wait for the file ``connect``."""
        while self.runtime.stats()["stored"] < self.plan["backlog"]:
            time.sleep(0.05)
        while not self._board.exists("connect"):
            self._sample()
            time.sleep(0.05)
        now = time.monotonic()
        self._waiting = deque([now] * len(self._waiting))  # the delay of a backlog starts here
        return now

    def _record(self):
        self._waiting.append(time.monotonic())
        self._produced += 1
        self.runtime.record_event(
            Event.model_construct(
                id=uuid4(),
                engine="celery",
                task_id=f"{self._number}-{self._produced}-{uuid4().hex[:8]}",
                kind=EventKind.TASK_SUCCEEDED,
                occurred_at=datetime.now(UTC),
                data={
                    "task_name": "bench.fleet",
                    "queue": "bench",
                    "worker": f"worker-{self._number}@bench",
                    "result": self._produced,
                    "runtime_ms": 10,
                },
            )
        )

    def _sample(self):
        state = self.runtime.supervisor_state()
        session = state["session_id"]
        if session != (self.sessions[-1][1] if self.sessions else None):
            self.sessions.append((round(time.monotonic(), 3), session, self._transport(session)))
        acked = sum(events for _, events in self.acks)
        self._board.write(self._number, self._produced, acked, bool(session), len(self.sessions))

    def _transport(self, session):
        return self.runtime.stats()["transport"] if session else ""


def _cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _pss():
    """Return this process's share of memory in MB: shared pages count in part."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main(path):
    plans = json.loads(sys.stdin.readline())
    board = Board(Path(path), len(plans))
    pids = []
    for number, plan in enumerate(plans):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                Host(number, plan, board).run()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1])
