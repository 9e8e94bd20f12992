"""What the trials of a run share.

A private Redis server, one real brain, and prepared batches of tasks.
"""

from __future__ import annotations

import compileall
import random
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self, TypeVar

from redis import Redis

import z4j_bare
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.redis_server import RedisServer

if TYPE_CHECKING:
    from celery import Celery

    from z4j_bare.demo.rest import Credentials

T = TypeVar("T")

QUEUE = "bench"
TASK = "bench.nap"
FAILING_TASK = "bench.fails"
ARGUMENTS = ("none", "five", "1k", "8k")

_PREPARING = 15  # the last of the databases that Redis has by default


class Peers:
    """A context manager that starts broker and brain.

    Its exit stops them and removes their directory.
    """

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="z4j-bench-"))
        self._stack = ExitStack()
        self._projects = 0
        self._preparing = Lock()
        self._random = random.Random(1)  # noqa: S311 - the same arguments in every run
        self.brain = Brain(self.home / "brain")

    def __enter__(self) -> Self:
        self._stack.callback(shutil.rmtree, self.home, ignore_errors=True)
        # Compile as pip does at install, because a worker that compiles modules uses 1 MB more.
        compileall.compile_dir(Path(z4j_bare.__file__).parent, quiet=1)
        try:
            self._server = self._stack.enter_context(RedisServer(self.home / "redis"))
            self._redis = self._stack.enter_context(Redis.from_url(self.broker()))
            self._stack.enter_context(self.brain)
            self._producer = self._stack.enter_context(self._build_producer())
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def broker(self, database: int = 0) -> str:
        """Return the broker's address; each worker of a round has a database of its own."""
        return self._server.url(database)

    def new_agent(self, title: str) -> Credentials:
        """Return credentials in a new project, so that the agent's rows can be counted."""
        self._projects += 1
        project = f"{title}-{self._projects}"[:50].lower()
        self.brain.create_project(project)
        return self.brain.mint_agent(project, title[:40])

    def prepare(self, count: int, arguments: str, task: str = TASK) -> list[bytes]:
        """Return the broker messages of new tasks that no worker has received."""
        with self._preparing, self._producer.producer_or_acquire() as producer:
            for number in range(count):
                self._producer.send_task(
                    task, kwargs=self._arguments(arguments, number), queue=QUEUE, producer=producer
                )
            messages: list[bytes] = self._redis_preparing.lrange(QUEUE, 0, -1)
            self._redis_preparing.delete(QUEUE)
        return messages

    def release(self, database: int, messages: list[bytes]) -> None:
        """Put prepared tasks into a worker's queue at once.

        Therefore no producer competes with the worker for the processor.
        """
        with Redis.from_url(self.broker(database)) as client:
            if client.rpush(QUEUE, *messages) > len(messages):
                raise HarnessError("the queue was not empty when the next batch was released")

    def purge(self) -> None:
        """Delete all messages and bindings."""
        self._redis.flushall()

    def _build_producer(self) -> Celery:
        from celery import Celery

        self._redis_preparing = self._stack.enter_context(Redis.from_url(self.broker(_PREPARING)))
        return Celery(
            "bench_producer", broker=self.broker(_PREPARING), changes={"task_default_queue": QUEUE}
        )

    def _arguments(self, kind: str, number: int) -> dict[str, Any]:
        if kind == "none":
            return {}
        if kind == "five":
            order = f"A-{number:06d}"
            return {
                "user_id": 40_000 + number,
                "order": order,
                "amount": number / 100,
                "currency": "EUR",
                "notify": True,
            }
        return {"body": self._prose({"1k": 1024, "8k": 8192}[kind])}

    def _prose(self, length: int) -> str:
        letters = self._random.choices(string.ascii_lowercase + "    ", k=length)
        return "".join(letters)


def wait_count(
    count: Callable[[], int],
    expected: int,
    *,
    quiet: float,
    timeout: float,
    on_change: Callable[[], None] = lambda: None,
) -> int:
    """Poll ``count()`` until it is ``expected``, unchanged for ``quiet`` seconds, or time is up.

    The count is polled every 0.5 s to spare the brain. After a change, ``on_change()`` is called.
    """
    deadline, changed_at, last = time.monotonic() + timeout, time.monotonic(), -1
    while True:
        now, found = time.monotonic(), count()
        if found != last:
            last, changed_at = found, now
            on_change()
        if found >= expected or now - changed_at > quiet or now > deadline:
            return found
        time.sleep(0.5)


def rotated(items: list[T], number: int) -> list[T]:
    """Return ``items`` in an order that differs from round to round."""
    shift = number % len(items)
    return items[shift:] + items[:shift]


def progress(text: str) -> None:
    """Print a progress line to standard error."""
    print(text, file=sys.stderr, flush=True)


__all__ = ["ARGUMENTS", "Peers", "progress", "rotated", "until", "wait_count"]
