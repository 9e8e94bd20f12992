"""A harness for the dispatcher in virtual time: it submits commands and reads stored results."""

import json
from types import SimpleNamespace

from tests.support.engines import FakeEngineHost
from tests.support.session import SessionHarness
from z4j_bare.buffer.rows import RESULT
from z4j_bare.commands import Dispatcher


class CommandHarness(SessionHarness):
    """A dispatcher with fake engine hosts and a real buffer manager.

    ``new_process`` replaces the dispatcher, as a restart on the same disk does.
    """

    def __init__(self, engines=("celery",), workers=2):
        super().__init__()
        self.hosts = {name: FakeEngineHost(self.backend, name) for name in engines}
        self.host = next(iter(self.hosts.values()), None)
        self.wakeups = 0
        self.workers = workers
        self.new_process()

    def new_process(self):
        self.dispatcher = Dispatcher(
            self.hosts, self.buffer, self.count_wakeup, self.backend, self.counters, self.workers
        )

    def count_wakeup(self):
        self.wakeups += 1

    @property
    def results(self):
        """All results stored for sending, in order: pairs of command id and payload."""
        rows = self.disk.store.drain(0, 10_000, 10**9, (RESULT,))
        return [(row.key, json.loads(row.payload)) for row in rows]

    def command(
        self,
        action="retry_task",
        parameters=None,
        *,
        identity="c-1",
        target=None,
        timeout=60,
        token=None,
        delay=0.0,
    ):
        """Submit a command frame."""
        payload = SimpleNamespace(
            action=action,
            target=target or {},
            parameters={"task_id": "t"} if parameters is None else parameters,
            timeout_seconds=timeout,
            delivery_claim_token=token,
        )
        self.dispatcher.submit(
            SimpleNamespace(id=identity, payload=payload), self.connection, delay
        )

    def run(self, *args, **options):
        """Submit one command and return the payload of its result, the only one stored."""
        self.command(*args, **options)
        self.backend.advance(100)
        ((_, payload),) = self.results
        return payload
