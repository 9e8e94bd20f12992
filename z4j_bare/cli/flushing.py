"""Sending what dead processes have left, without an agent: over the long-poll routes, where nobody says hello.

A hello would overwrite what the brain knows of the agent's engines, and take the commands that wait for it. A row leaves
its store when the brain has acknowledged it, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer.errors import BUSY, classify
from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT, BufferEntry
from z4j_bare.buffer.store import BufferStore
from z4j_bare.concurrency import build, choose, detect
from z4j_bare.diagnostics.remote import silent_hello
from z4j_bare.errors import FrameTooLargeError, LocalStorageError
from z4j_bare.settings import deployment_id, read_key, read_token
from z4j_bare.transport.auto import LONGPOLL, TransportFactory
from z4j_bare.wire import frames
from z4j_bare.wire.frames import shrink_result
from z4j_bare.wire.session import Session, parse_hello_ack

if TYPE_CHECKING:
    from pathlib import Path

    from z4j_core.models import Config

    from z4j_bare.settings import Settings

#: Rows and bytes read at a time; what the brain takes in one piece is found out by trying.
ROWS = 500
BYTES = 512 * 1024


class Flush:
    """Sends stores one after the other, over one session; call ``close`` at the end.

    ``sent`` counts rows that are gone because the brain has them, ``passed_over`` has stores with the reason.
    """

    def __init__(self, config: Config, settings: Settings) -> None:
        self.sent = 0
        self.passed_over: list[tuple[Path, str]] = []
        self._config = config
        self._backend = build(choose(settings.concurrency, detect()))
        self._key = read_key(config, settings)
        self._most = ROWS
        url, token = str(config.brain_url), partial(read_token, config, settings)
        self._line = TransportFactory(
            url, LONGPOLL, token, settings, self._backend, dev_mode=config.dev_mode
        ).longpoll()
        self._session: Session | None = None

    def close(self) -> None:
        """Release the line."""
        self._line.close()
        self._backend.close()

    def send(self, path: Path, done: Callable[[int], None]) -> None:
        """Send one store's rows and delete its file when it is empty; ``done`` gets the running total.

        Raises ``LocalStorageError`` when its process lives, ``NetworkError`` and ``RemoteError`` when the brain does not
        take the rows. A store of another project is passed over.
        """
        try:
            store = BufferStore(
                path, deployment=deployment_id(self._config, self._key), create=False
            )
        except LocalStorageError as error:
            if classify(error) == BUSY:
                raise
            self.passed_over.append((path, str(error)))
            return
        try:
            for kind, deliver in ((RESULT, self._results), (EVENT, self._events)):
                self._drain(store, kind, deliver, done)
            if others := store.drain(0, 1, BYTES, (PROJECTION,)):
                self.passed_over.append(
                    (
                        path,
                        f"{others[0].kind} rows are for the agent that goes on with their stream",
                    )
                )
        finally:
            store.close()

    def _drain(
        self,
        store: Any,
        kind: str,
        deliver: Callable[[Sequence[BufferEntry]], int],
        done: Callable[[int], None],
    ) -> None:
        after = 0
        while rows := store.drain(after, ROWS, BYTES, (kind,)):
            delivered = deliver(rows)
            if not delivered:  # one row that no frame can carry stays
                self.passed_over.append(
                    (store.path, f"row {rows[0].id} is larger than the brain takes")
                )
                after = rows[0].id
                continue
            store.confirm([row.id for row in rows[:delivered]])
            self.sent += delivered
            done(self.sent)

    def _events(self, rows: Sequence[BufferEntry]) -> int:
        """Send as many of the events as fit; return how many."""
        number = min(len(rows), self._most)
        while number:
            try:
                self._post(
                    "event_batch",
                    frames.frame_id("ev"),
                    frames.event_batch([row.payload for row in rows[:number]]),
                )
                return number
            except FrameTooLargeError:
                number //= 2
                self._most = max(1, number)
        return 0

    def _results(self, rows: Sequence[BufferEntry]) -> int:
        row = rows[0]
        for payload in (row.payload, *shrink_result(row.payload)):
            try:
                self._post("command_result", row.key, payload)
                return 1
            except FrameTooLargeError:
                continue
        return 0

    def _post(self, kind: str, identity: str, payload: bytes) -> None:
        session = self._session or self._connect()
        self._line.send(lambda: session.sign(kind, identity, payload, self._backend.wall()))

    def _connect(self) -> Session:
        self._session = Session(parse_hello_ack(self._line.connect(silent_hello())), self._key)
        return self._session
