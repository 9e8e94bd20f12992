"""Opens a new store in the first usable directory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict, Unpack

from z4j_bare.buffer import files
from z4j_bare.buffer.errors import BUSY, CORRUPT, FULL, classify
from z4j_bare.buffer.existing_agent import ExistingBuffer, key_digest
from z4j_bare.buffer.open_runs import OrphanRuns
from z4j_bare.buffer.recovery import TARGET_BACKLOG, Orphan
from z4j_bare.buffer.store import BufferStore
from z4j_bare.errors import LocalStorageError
from z4j_bare.settings import deployment_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from z4j_core.models import Config


#: Causes of errors after which no other directory is tried.
_NOT_CURED_BY_MOVING = frozenset({BUSY, FULL, CORRUPT})


class StoreOptions(TypedDict, total=False):
    """Keyword arguments that :func:`open_store` passes to :class:`BufferStore`."""

    max_rows: int
    max_bytes: int
    deployment: str
    busy_timeout: float
    clock: Callable[[], float]


def open_store(buffer_path: str | os.PathLike[str], **options: Unpack[StoreOptions]) -> BufferStore:
    """Return a new store in the directory of ``buffer_path``, or else in ``<tmp>/z4j-<uid>``.

    A directory is unusable if it cannot be created or written, belongs to another user, is writable
    by others or is a symbolic link. A network file system without WAL or record locks is also
    unusable. Record locks are needed to find out whether the owner of a store is alive. ``notice``
    of the returned store says why the configured directory is not used. If no directory is usable,
    or if the disk of the configured directory is busy or full, raises ``LocalStorageError`` with
    the error of the configured directory.
    """
    first_error: LocalStorageError | None = None
    for directory in _directories(buffer_path):
        try:
            store = BufferStore(files.new_store_path(directory / "store"), **options)
        except LocalStorageError as error:
            if first_error is None and classify(error) in _NOT_CURED_BY_MOVING:
                raise
            first_error = first_error or error
            continue
        if first_error is not None:
            store.notice = f"{first_error}. Until this is corrected, the buffer is in {directory}"
        return store
    raise first_error or LocalStorageError(f"there is no directory for {buffer_path}")


class StoreOpener:
    """Opens and claims stores with the limits and the deployment id of a configuration.

    :param secret: returns the project's key. Called for each store, because the key can be rotated.
    """

    def __init__(self, config: Config, secret: Callable[[], bytes]) -> None:
        #: Called with the path of each store that was opened.
        self.on_open: Callable[[Path], None] | None = None
        self.buffer_path = str(config.buffer_path)
        self._config = config
        self._secret = secret

    def open(self) -> BufferStore:
        """Return a new store. Raises ``LocalStorageError``."""
        config = self._config
        store = open_store(
            config.buffer_path,
            max_rows=config.buffer_max_events,
            max_bytes=config.buffer_max_bytes,
            deployment=self.deployment(),
        )
        if self.on_open is not None:
            self.on_open(store.path)
        return store

    def claim(self, path: Path) -> Orphan:
        """Claim and return the store of a dead process. Raises ``LocalStorageError``."""
        return Orphan(
            path,
            self.deployment(),
            max_rows=self._config.buffer_max_events,
            max_bytes=self._config.buffer_max_bytes,
        )

    def claim_existing(self, path: Path) -> ExistingBuffer:
        """Claim and return a buffer of the existing agent. Raises ``LocalStorageError``."""
        backlog = min(TARGET_BACKLOG, self._config.buffer_max_events // 4)
        return ExistingBuffer(path, key_digest(self._secret()), backlog)

    def claim_runs(self, path: Path) -> OrphanRuns:
        """Lock and return the open runs of a dead process. Raises ``LocalStorageError``."""
        return OrphanRuns(path, self.deployment())

    def deployment(self) -> str:
        """Return the id of the deployment to which the stores belong."""
        return deployment_id(self._config, self._secret())


def _directories(buffer_path: str | os.PathLike[str]) -> Iterator[Path]:
    configured, *temporary = files.candidate_directories(buffer_path)
    yield configured
    yield from temporary
    # Random names are tried last, in case another user occupies the predictable names.
    # Stores in these directories are never adopted, because other processes do not know the names.
    yield from (path.with_name(f"{path.name}-{os.urandom(8).hex()}") for path in temporary)
