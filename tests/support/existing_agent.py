"""Buffers of the existing agent, as z4j-bare 1.13.0 writes them."""

import fcntl
import json
import os
import sqlite3
import time
from contextlib import closing, contextmanager
from uuid import uuid4

from z4j_bare.buffer.existing_agent import MIN_AGE, key_digest

_TABLES = """
CREATE TABLE _meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE entries (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    kind             TEXT    NOT NULL,
    payload          BLOB    NOT NULL,
    created_at       REAL    NOT NULL,
    attempts         INTEGER NOT NULL DEFAULT 0,
    content_rejects  INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX idx_entries_created_at ON entries (created_at);
"""


def existing_event(number, **fields):
    """Return an event of the existing agent."""
    return {
        "id": str(uuid4()),
        "kind": "task.received",
        "engine": "celery",
        "task_id": f"t{number}",
        "occurred_at": "2026-11-28T21:58:51.661271+00:00",
        "data": {"task_name": "shop.add", "args": [number], "é": "ü"},
        **fields,
    }


def existing_frame(*events):
    """Return the frame in which the existing agent stores events."""
    frame = {
        "v": 2,
        "id": f"ev_{uuid4().hex}",
        "ts": "2026-11-28T21:58:51.661360Z",
        "nonce": "",
        "seq": 0,
        "hmac": "",
        "type": "event_batch",
        "payload": {"events": list(events)},
    }
    return json.dumps(frame, separators=(",", ":"), ensure_ascii=False).encode()


def make_existing_buffer(directory, key, rows, *, pid=4376, age=60.0):
    """Create the buffer of an ended process of the existing agent; return its path.

    :param rows: pairs of kind and payload.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"buffer-{pid}.sqlite"
    os.close(os.open(path, os.O_CREAT, 0o600))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(_TABLES)
        connection.executemany(
            "INSERT INTO _meta VALUES (?, ?)",
            [
                ("buffer_uuid", uuid4().hex),
                ("lifecycle", "sealed_ready"),
                ("deployment", key_digest(key)),
                ("owner_pid", str(pid)),
            ],
        )
        now = time.time()
        connection.executemany(
            "INSERT INTO entries (kind, payload, created_at) VALUES (?, ?, ?)",
            [
                (kind, payload, now - age + number * 1e-4)
                for number, (kind, payload) in enumerate(rows)
            ],
        )
        connection.commit()
    make_old(path)
    return path


def make_old(path):
    """Set the time of the file's last change to a time at which no process creates the file."""
    changed = time.time() - MIN_AGE - 1
    os.utime(path, (changed, changed))


@contextmanager
def running_owner(path):
    """Hold the lock that a running process of the existing agent holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
