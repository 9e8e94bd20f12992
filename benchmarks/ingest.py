"""Events a second that the brain takes from one connection, by the number of events in a frame.

There is no worker and no buffer: the agent's wire and transport send frames as fast as acks allow.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from benchmarks.peers import Peers, progress
from benchmarks.report import circumstances, save, table
from z4j_bare.demo.process import HarnessError
from z4j_bare.errors import AgentError

if TYPE_CHECKING:
    from z4j_bare.demo.rest import Credentials

FRAMES = (500, 50, 1)
IN_FLIGHT = 1000
_ACK_TIMEOUT = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument(
        "--events", type=int, default=3000, help="events for each frame size (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> None:
    """Measure every frame size in every round; print and save the table."""
    before = circumstances()
    rates: dict[int, list[float]] = {size: [] for size in FRAMES}
    with Peers() as peers:
        for number in range(args.rounds):
            for size in FRAMES[number % len(FRAMES) :] + FRAMES[: number % len(FRAMES)]:
                count = args.events if size > 1 else max(1, args.events // 6)  # only 49 events/s
                progress(f"round {number + 1}: {count} events in frames of {size}")
                rates[size].append(Feed(peers.new_agent("ingest")).rate(count, size))
    rows = [
        (size, *(f"{each:.0f}" for each in (min(found), median(found), max(found))))
        for size, found in rates.items()
    ]
    print(table(("events a frame", "lowest events/s", "median", "highest"), rows))
    print(f"saved {save('ingest', {**before, 'events_per_second': rates})}")


class Feed:
    """One session that sends events and counts acks."""

    def __init__(self, agent: Credentials) -> None:
        from z4j_core.transport.hmac import decode_agent_hmac_secret

        from z4j_bare.concurrency.threads import ThreadsConcurrency
        from z4j_bare.transport.endpoint import websocket_url
        from z4j_bare.transport.websocket import WebSocketTransport

        self._secret = decode_agent_hmac_secret(agent.hmac_secret)
        self._backend = ThreadsConcurrency()
        url = websocket_url(agent.brain_url, dev_mode=False)
        self._transport = WebSocketTransport(url, lambda: agent.token, self._backend)
        self._in_flight: dict[str, int] = {}
        self._condition = threading.Condition()
        self._failure: AgentError | None = None

    def rate(self, count: int, size: int) -> float:
        """Return events a second, from the first frame sent to the last ack received."""
        from z4j_bare.wire.session import Session, parse_hello_ack

        self._session = Session(parse_hello_ack(self._transport.connect(_hello())), self._secret)
        reader = threading.Thread(target=self._read, args=(count,), daemon=True)
        reader.start()
        try:
            began = time.monotonic()
            for events in _frames(_events(count), size):
                self._send(events)
            reader.join(_ACK_TIMEOUT)
            if self._failure is not None:
                raise HarnessError(f"the session ended early: {self._failure}")
            if reader.is_alive():
                raise HarnessError(f"the brain acknowledged too little within {_ACK_TIMEOUT:.0f} s")
            return count / (self._ended - began)
        finally:
            self._transport.abort()
            reader.join(5.0)
            self._transport.close()

    def _send(self, events: Sequence[bytes]) -> None:
        from z4j_bare.wire.frames import event_batch, frame_id

        frame = frame_id("ev")
        with self._condition:
            self._condition.wait_for(
                lambda: sum(self._in_flight.values()) + len(events) <= IN_FLIGHT, _ACK_TIMEOUT
            )
            self._in_flight[frame] = len(events)
        payload = event_batch(events)
        self._transport.send(lambda: self._session.sign("event_batch", frame, payload, time.time()))

    def _read(self, count: int) -> None:
        try:
            self._count_down(count)
        except (
            AgentError
        ) as error:  # also when the sender was interrupted and closed the connection
            self._failure = error

    def _count_down(self, count: int) -> None:
        while count > 0:
            message = self._transport.receive(_ACK_TIMEOUT)
            if message is None:  # a ping; the transport raises if the brain is silent
                continue
            frame: Any = self._session.verify(message)
            if frame.type == "event_batch_ack":
                with self._condition:
                    count -= self._in_flight.pop(str(frame.payload.acked_id))
                    self._condition.notify()
        self._ended = time.monotonic()


def _hello() -> bytes:
    from datetime import UTC, datetime

    from z4j_bare.wire.frames import Identity, hello

    now = datetime.now(UTC)
    return hello(
        Identity("bare", "1.13.0", f"bench-{uuid4().hex[:8]}", 1, now, engines=("celery",))
    )


def _events(count: int) -> Iterator[bytes]:
    """Yield the events of tasks without arguments, three for each task, as capture encodes them."""
    from z4j_core.redaction.engine import RedactionEngine

    from z4j_bare.events.encode import Encoder
    from z4j_bare.events.redaction import Redactor

    encode = Encoder("celery", Redactor(RedactionEngine()))
    own = {"worker": "worker@bench", "queue": "bench"}
    common = {"task_name": "bench.nap"}
    for number in range(count):
        kind = number % 3
        if kind == 0:
            task = str(uuid4())
        extra = (
            {"args": [], "kwargs": {}, "root_task_id": task},
            {},
            {"result": None, "runtime_ms": 10},
        )[kind]
        name = ("task.received", "task.started", "task.succeeded")[kind]
        yield encode((encode, name, time.time(), task, common, {**own, **extra}))


def _frames(events: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    """Yield batches of at most ``size`` events and ``FRAME_BYTES`` bytes, as the sender does."""
    from z4j_bare.pipeline.send import FRAME_BYTES

    batch: list[bytes] = []
    room = FRAME_BYTES
    for event in events:
        if batch and (len(batch) == size or len(event) > room):
            yield batch
            batch, room = [], FRAME_BYTES
        batch.append(event)
        room -= len(event)
    if batch:
        yield batch
