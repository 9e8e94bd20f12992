"""Uploads the rows of orphaned stores over the brain's long-poll routes, without an agent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from z4j_bare.buffer.errors import BUSY, classify
from z4j_bare.buffer.existing_agent import ExistingBuffer, key_digest
from z4j_bare.buffer.open_runs import OrphanRuns
from z4j_bare.buffer.recovery import DONE
from z4j_bare.buffer.rows import EVENT, PROJECTION, RESULT, BufferEntry
from z4j_bare.buffer.store import BufferStore
from z4j_bare.concurrency import build, choose, detect
from z4j_bare.diagnostics.remote import unsent_hello
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

#: Maximum number of rows that one read of a store returns, and of events that one frame contains.
MAX_ROWS = 500

#: Maximum number of events of open runs in one frame.
#: If an id has 200 bytes and a description has 500 bytes, the frame has 100 KiB.
RUN_EVENTS = 100

#: Maximum bytes of payloads that one read of a store returns. A larger row is returned alone.
MAX_BYTES = 512 * 1024

#: A function that sends rows of one kind.
#: A result of ``n`` means that the brain has acknowledged the first ``n`` rows.
SendRows = Callable[[Sequence[BufferEntry]], int]


class OrphanUploader:
    """Sends the rows of stores over one session. Call ``close`` after the last store.

    The uploader sends no ``hello``, because a ``hello`` overwrites the agent's engines in the brain
    and claims the agent's pending commands. A row is deleted after the brain has acknowledged it.

    ``sent`` is the number of acknowledged rows, ``runs`` the number of reported open runs.
    ``skipped`` lists each store in which rows are left, with the reason.
    """

    def __init__(self, config: Config, settings: Settings) -> None:
        self.sent = 0
        self.runs = 0
        self.skipped: list[tuple[Path, str]] = []
        self._backend = build(choose(settings.concurrency, detect()))
        self._key = read_key(config, settings)
        self._deployment = deployment_id(config, self._key)
        self._max_events = MAX_ROWS
        self._transport = TransportFactory(
            str(config.brain_url),
            LONGPOLL,
            partial(read_token, config, settings),
            settings,
            self._backend,
            dev_mode=config.dev_mode,
        ).longpoll()
        self._session: Session | None = None

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()
        self._backend.close()

    def send(self, path: Path, done: Callable[[int], None]) -> None:
        """Send the rows of one store and close the store, which deletes the file if it is empty.

        A store that cannot be opened, for example a store of another deployment, is added to
        ``skipped``. Raises ``LocalStorageError`` if the store belongs to a running process, and
        ``NetworkError`` or ``RemoteError`` if the brain does not accept the rows.

        :param done: function that is called with the number of rows sent so far from all stores.
        """
        deployment = self._deployment
        try:
            store = BufferStore(path, deployment=deployment, create=False)
        except LocalStorageError as error:
            if classify(error) == BUSY:
                raise
            self.skipped.append((path, str(error)))
            return
        try:
            # Send results first: each result ends a command that the dashboard shows as pending.
            self._send_kind(store, RESULT, self._send_result, done)
            self._send_kind(store, EVENT, self._send_events, done)
            if store.drain(0, 1, MAX_BYTES, (PROJECTION,)):
                self.skipped.append(
                    (path, "only an agent can send its projection rows (schedule snapshots)")
                )
        finally:
            store.close()

    def claim_existing(self, path: Path) -> ExistingBuffer:
        """Claim a buffer of the existing agent.

        Raises ``LocalStorageError`` if the buffer's process runs or the buffer belongs to another
        project.
        """
        return ExistingBuffer(path, key_digest(self._key), sys.maxsize)

    def import_existing(self, buffers: Sequence[ExistingBuffer], path: Path) -> None:
        """Move the events of the existing agent's buffers into a new store at ``path``."""
        store = BufferStore(path, deployment=self._deployment)
        try:
            for buffer in buffers:
                while buffer.step(store) != DONE:
                    pass
        finally:
            store.close()

    def send_runs(self, path: Path) -> None:
        """Report the runs that were open when the file's process ended, and delete the file.

        Call this method only after all rows of the process have been sent. The file of a running
        process or of another deployment is skipped. Raises ``NetworkError`` or ``RemoteError``.
        """
        try:
            runs = OrphanRuns(path, self._deployment)
        except LocalStorageError as error:
            if classify(error) != BUSY:
                self.skipped.append((path, str(error)))
            return
        done = False
        try:
            events = runs.events()
            for first in range(0, len(events), RUN_EVENTS):
                batch = frames.event_batch(events[first : first + RUN_EVENTS])
                self._send_frame("event_batch", frames.frame_id("ev"), batch)
            self.runs += len(runs)
            done = True
        finally:
            runs.release(delete=done)

    def _send_kind(
        self, store: BufferStore, kind: str, send: SendRows, done: Callable[[int], None]
    ) -> None:
        after = 0
        while rows := store.drain(after, MAX_ROWS, MAX_BYTES, (kind,)):
            sent = send(rows)
            if not sent:  # The first row alone is too large for a frame.
                reason = f"row {rows[0].id} is larger than the brain accepts"
                self.skipped.append((store.path, reason))
                after = rows[0].id
                continue
            store.confirm([row.id for row in rows[:sent]])
            self.sent += sent
            done(self.sent)

    def _send_events(self, rows: Sequence[BufferEntry]) -> int:
        """Send as many of the first events as fit into one frame; return the number of events.

        If the brain rejects the frame as too large, the method sends half as many events.
        """
        number = min(len(rows), self._max_events)
        while number:
            batch = frames.event_batch([row.payload for row in rows[:number]])
            try:
                self._send_frame("event_batch", frames.frame_id("ev"), batch)
                return number
            except FrameTooLargeError:
                number //= 2
                self._max_events = max(1, number)
        return 0

    def _send_result(self, rows: Sequence[BufferEntry]) -> int:
        """Send the first result, shortened if necessary, and return 1.

        Return 0 if even the shortest version is too large for a frame.
        """
        row = rows[0]
        for payload in (row.payload, *shrink_result(row.payload)):
            try:
                self._send_frame("command_result", row.key, payload)
                return 1
            except FrameTooLargeError:
                continue
        return 0

    def _send_frame(self, kind: str, frame_id: str, payload: bytes) -> None:
        session = self._session or self._connect()
        self._transport.send(lambda: session.sign(kind, frame_id, payload, self._backend.wall()))

    def _connect(self) -> Session:
        self._session = Session(parse_hello_ack(self._transport.connect(unsent_hello())), self._key)
        return self._session
