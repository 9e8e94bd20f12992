"""A new store in the first directory that will have one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from z4j_bare.buffer import files as paths
from z4j_bare.buffer.errors import BUSY, CORRUPT, FULL, classify
from z4j_bare.buffer.recovery import Orphan
from z4j_bare.buffer.store import BufferStore
from z4j_bare.errors import LocalStorageError
from z4j_bare.settings import deployment_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from z4j_core.models import Config

#: Troubles that another directory does not cure, or that pass.
_NOT_CURED_BY_MOVING = frozenset({BUSY, FULL, CORRUPT})


def open_store(buffer_path: str | os.PathLike[str], **options: Any) -> BufferStore:
    """Return a new store beside the configured path, else in ``<tmp>/z4j-<uid>``; ``options`` are the store's.

    A directory is passed over when it cannot be made or written, belongs to somebody else, can be written by others, is a
    symbolic link, or lies on a file system without record locks or WAL (some network file systems): there a dead owner
    could not be told from a living one. ``notice`` of the store says what was wrong. Raises ``LocalStorageError`` with the
    trouble of the configured directory when no other serves either.
    """
    trouble: LocalStorageError | None = None
    for directory in _directories(buffer_path):
        try:
            store = BufferStore(paths.new_store_path(directory / "store"), **options)
        except LocalStorageError as error:
            if trouble is None and classify(error) in _NOT_CURED_BY_MOVING:
                raise
            trouble = trouble or error
            continue
        if trouble is not None:
            store.notice = f"{trouble}. Until then the buffer is in {directory}"
        return store
    raise trouble or LocalStorageError(f"there is no directory for {buffer_path}")


class StoreOpener:
    """Opens and claims stores with the limits and the deployment id of a configuration.

    :param secret: returns the project's key; called for each store, because it can be rotated.
    """

    def __init__(self, config: Config, secret: Callable[[], bytes]) -> None:
        self._config = config
        self._secret = secret

    def open(self) -> BufferStore:
        """Return a new store. Raises ``LocalStorageError``."""
        return open_store(self._config.buffer_path, **self._limits(), deployment=self._deployment())

    def claim(self, path: Path) -> Orphan:
        """Return the store of a dead process, locked. Raises ``LocalStorageError``."""
        return Orphan(path, self._deployment(), **self._limits())

    def _deployment(self) -> str:
        return deployment_id(self._config, self._secret())

    def _limits(self) -> dict[str, int]:
        config = self._config
        return {"max_rows": config.buffer_max_events, "max_bytes": config.buffer_max_bytes}


def _directories(buffer_path: str | os.PathLike[str]) -> Iterator[Path]:
    configured, *temporary = paths.candidate_directories(buffer_path)
    yield configured
    yield from temporary
    # Somebody sits on the names that can be foreseen. Nobody will look for orphans under this one.
    yield from (place.with_name(f"{place.name}-{os.urandom(8).hex()}") for place in temporary)
