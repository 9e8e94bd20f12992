"""The pipe by which the children of a prefork worker send what their signal handlers capture.

A child never waits for the pipe: a message that does not fit is counted in shared memory. A message
arrives whole or not at all, also if its writer is killed meanwhile.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
from contextlib import suppress

# gevent and eventlet patch the functions of ``os``.
from posix import close, read, write
from struct import Struct
from typing import TYPE_CHECKING

from z4j_bare.concurrency import fork

if TYPE_CHECKING:
    from pathlib import Path

#: Size of the pipe in bytes. It holds 1,024 messages of 1 KB: one second of a fast worker.
PIPE_BYTES = 1024 * 1024

#: Sizes that are tried instead. Beyond 64 pipes of 1 MiB the kernel refuses a user who is not root.
_SMALLER_SIZES = (512 * 1024, 256 * 1024, 128 * 1024)

#: Maximum bytes of one write. The kernel divides longer ones (``PIPE_BUF``).
CHUNK_BYTES = 4096

#: Maximum bytes that are taken from the pipe at once.
READ_BYTES = 64 * 1024

#: Number of counters of lost messages. A new child gets the next one; beyond, they are used again.
LOSS_SLOTS = 4096

#: Maximum number of incomplete messages of one child. Several threads of a child may write.
MAX_PARTIAL = 8

#: A chunk's header: bytes of data, pid, the message's number, the part's number, number of parts.
_HEADER = Struct("<HIIHH")
_DATA_BYTES = CHUNK_BYTES - _HEADER.size
_MAX_PARTS = 0xFFFF

#: Files of a channel with names.
_PIPE, _COUNTERS = "pipe", "counters"

#: States of the agent, as the children see them. The children send as long as it is not ABSENT.
UNDECIDED, PRESENT, ABSENT = 0, 1, 2

#: Number of forks of this process, which gives each child a number of its own.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork)


class SharedCounters:
    """Shared memory of a worker and its children: lost messages, and the state of the agent.

    Each child has a counter of its own, because counting in shared memory is not atomic.
    """

    #: Size in bytes.
    SIZE = 4 * (LOSS_SLOTS + 1)

    def __init__(self, descriptor: int = -1) -> None:
        self._numbers = memoryview(mmap.mmap(descriptor, self.SIZE)).cast("I")

    @property
    def agent(self) -> int:
        """The state of the agent."""
        return self._numbers[LOSS_SLOTS]

    @agent.setter
    def agent(self, state: int) -> None:
        self._numbers[LOSS_SLOTS] = state

    def add_lost(self, slot: int) -> None:
        """Count a lost message."""
        self._numbers[slot] = (self._numbers[slot] + 1) & 0xFFFFFFFF

    def lost(self) -> int:
        """Return the number of lost messages of all children."""
        return sum(self._numbers[:LOSS_SLOTS])


class ChannelWriter:
    """The end of one process. Never waits and never raises ``OSError``.

    :param slot: the process's counter in ``counters``.
    """

    def __init__(self, descriptor: int, counters: SharedCounters, slot: int) -> None:
        self._descriptor = descriptor
        self._counters = counters
        self._slot = slot
        self._pid = os.getpid()
        self._number = 0

    def send(self, message: bytes) -> bool:
        """Send a message; return ``False`` and count it if it cannot be sent completely."""
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        size = len(message)
        try:
            if size <= _DATA_BYTES:
                write(self._descriptor, _HEADER.pack(size, self._pid, number, 0, 1) + message)
                return True
            parts = -(-size // _DATA_BYTES)
            if parts <= _MAX_PARTS:
                for part in range(parts):
                    data = message[part * _DATA_BYTES : (part + 1) * _DATA_BYTES]
                    header = _HEADER.pack(len(data), self._pid, number, part, parts)
                    write(self._descriptor, header + data)
                return True
        except OSError:  # the pipe is full, or the parent is gone
            pass
        except BaseException:  # a time limit of the host, between two parts
            self.count_lost()
            raise
        self.count_lost()
        return False

    def mark(self, message: bytes) -> None:
        """Send a short message that need not arrive."""
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        with suppress(OSError):
            write(self._descriptor, _HEADER.pack(len(message), self._pid, number, 0, 1) + message)

    def count_lost(self) -> None:
        """Count a message as lost."""
        self._counters.add_lost(self._slot)


class ChannelReader:
    """The parent's end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = b""
        self._partial: dict[int, dict[int, list[bytes]]] = {}
        self._last_number: dict[int, int] = {}
        #: Whether the last :meth:`read` emptied the pipe.
        self.empty = True
        #: Number of messages whose writers were killed, or whose chunks were damaged.
        self.lost = 0

    def fileno(self) -> int:
        """Return the descriptor, for ``wait_readable``."""
        return self._descriptor

    def read(self) -> list[tuple[int, bytes]]:
        """Return the next complete messages, each with the writer's pid. Does not wait."""
        try:
            data = read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            data = b""
        self.empty = len(data) < READ_BYTES
        return self._split(self._buffer + data) if data else []

    def forget(self, pid: int) -> None:
        """Count the message that a process was sending when it was killed.

        Incomplete ones before it were counted by their writer.
        """
        last = self._last_number.pop(pid, None)
        self.lost += last in self._partial.pop(pid, ())

    def _split(self, data: bytes) -> list[tuple[int, bytes]]:
        messages, position, end = [], 0, len(data)
        while end - position >= _HEADER.size:
            size, pid, number, part, parts = _HEADER.unpack_from(data, position)
            start = position + _HEADER.size
            if size > _DATA_BYTES or part >= parts:
                # Another program of the host has written to the descriptor. The rest of what has
                # been read cannot be divided.
                self.lost += 1
                position = end
                break
            if start + size > end:
                break
            position = start + size
            self._last_number[pid] = number
            if parts == 1:
                messages.append((pid, data[start:position]))
            elif message := self._join(pid, number, part, parts, data[start:position]):
                messages.append((pid, message))
        self._buffer = data[position:]
        return messages

    def _join(self, pid: int, number: int, part: int, parts: int, data: bytes) -> bytes | None:
        """Return the message if ``data`` is its last part."""
        incomplete = self._partial.setdefault(pid, {})
        if part == 0:
            while len(incomplete) >= MAX_PARTIAL:  # their writer has counted them
                del incomplete[next(iter(incomplete))]
            incomplete[number] = [data]
            return None
        received = incomplete.get(number)
        if received is None or len(received) != part:
            return None
        received.append(data)
        if len(received) < parts:
            return None
        del incomplete[number]
        if not incomplete:
            del self._partial[pid]
        return b"".join(received)


class Channel:
    """A pipe and its counters, made by the parent before it starts its children.

    :param directory: a new private directory for a named pipe and a file, for children that inherit
        nothing; ``None`` for forked children.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        if directory is None:
            self.counters = SharedCounters()
            read_end, self._write_end = os.pipe()
        else:
            read_end, self._write_end, self.counters = _make_named(directory)
        for descriptor in (read_end, self._write_end):
            os.set_blocking(descriptor, False)
        #: Size of the pipe in bytes.
        self.size = _enlarge(self._write_end)
        self.reader = ChannelReader(read_end)
        #: Pid of the parent.
        self.pid = os.getpid()
        self._epoch = fork.epoch()

    def is_own(self) -> bool:
        """Return whether this process made the channel."""
        return fork.epoch() == self._epoch

    def writer(self) -> ChannelWriter:
        """Return this process's end. In a child the end for reading is closed.

        So a child that outlives the parent gets an error, instead of filling the pipe.
        """
        if not self.is_own() and self.reader.fileno() >= 0:
            close(self.reader.fileno())
            self.reader = ChannelReader(-1)
        slot = 0 if self.is_own() else 1 + _forks % (LOSS_SLOTS - 1)
        return ChannelWriter(self._write_end, self.counters, slot)

    def close(self) -> None:
        """Close both ends."""
        for descriptor in (self.reader.fileno(), self._write_end):
            if descriptor >= 0:
                close(descriptor)
        self.remove()

    def remove(self) -> None:
        """Remove the directory, if this process made it."""
        if self._directory is not None and self.is_own():
            shutil.rmtree(self._directory, ignore_errors=True)

    def lost(self) -> int:
        """Return the number of messages that did not arrive."""
        return self.counters.lost() + self.reader.lost


class NamedChannel:
    """A child's view of a channel with names. The child was not forked, and inherits nothing.

    :raises OSError: the directory is gone, or nobody reads.
    """

    def __init__(self, directory: Path) -> None:
        self._write_end = os.open(directory / _PIPE, os.O_WRONLY | os.O_NONBLOCK)
        self.counters = _open_counters(directory)

    def writer(self) -> ChannelWriter:
        """Return this process's end. Few processes share a slot, and rarely count at once."""
        return ChannelWriter(self._write_end, self.counters, 1 + os.getpid() % (LOSS_SLOTS - 1))


def _make_named(directory: Path) -> tuple[int, int, SharedCounters]:
    directory.mkdir(mode=0o700)
    os.mkfifo(directory / _PIPE, 0o600)
    descriptor = os.open(directory / _COUNTERS, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.ftruncate(descriptor, SharedCounters.SIZE)
    close(descriptor)
    read_end = os.open(directory / _PIPE, os.O_RDONLY | os.O_NONBLOCK)
    write_end = os.open(directory / _PIPE, os.O_WRONLY | os.O_NONBLOCK)
    return read_end, write_end, _open_counters(directory)


def _open_counters(directory: Path) -> SharedCounters:
    descriptor = os.open(directory / _COUNTERS, os.O_RDWR)
    try:
        return SharedCounters(descriptor)
    finally:
        close(descriptor)


def _enlarge(descriptor: int) -> int:
    """Enlarge the pipe as far as the kernel permits, and return its size in bytes."""
    set_size = getattr(fcntl, "F_SETPIPE_SZ", None)
    if set_size is None:  # macOS: 64 KiB, chosen by the kernel
        return 64 * 1024
    for size in (PIPE_BYTES, *_SMALLER_SIZES):
        try:
            return fcntl.fcntl(descriptor, set_size, size)
        except OSError:
            continue
    return fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
