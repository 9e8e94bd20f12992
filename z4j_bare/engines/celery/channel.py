"""The pipe through which a prefork worker's children send the records of their signal handlers.

A child never waits for the pipe. If the pipe has no room for a message, the child adds 1 to a
counter of lost messages in shared memory. A message arrives whole or not at all, even if its writer
is killed.

While the parent reads at short intervals, a child keeps the message about the start of a run in
shared memory. The child sends this "kept start" together with its next message, usually the end of
the run, because one write costs less than two. If the run takes longer, or if the child is killed,
the parent reads the kept start from the shared memory.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
from contextlib import suppress

# The functions come from ``posix``, because gevent and eventlet patch the functions of ``os``.
from posix import close, read, write
from struct import Struct
from typing import TYPE_CHECKING

from z4j_bare.concurrency import fork
from z4j_bare.engines.celery.kept_starts import MAX_MESSAGE_BYTES, KeptStarts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

#: Size of the pipe in bytes.
#: The pipe holds 1,024 messages of 1 KB. A fast worker sends this number in one second.
PIPE_BYTES = 1024 * 1024

#: Sizes of the pipe in bytes that are tried if the kernel refuses :data:`PIPE_BYTES`.
#: By default, the kernel permits 64 pipes of 1 MiB to each user who is not root.
_SMALLER_SIZES = (512 * 1024, 256 * 1024, 128 * 1024)

#: Maximum bytes of one write (``PIPE_BUF``). The kernel may divide a longer write.
CHUNK_BYTES = 4096

#: Maximum bytes of one read from the pipe.
READ_BYTES = 64 * 1024

#: Number of counters of lost messages, and of slots for kept starts. Each new child uses the next
#: index for its counter and its slot.
LOSS_SLOTS = 4096

#: Maximum number of incomplete messages that are kept for one child.
#: A child can have several incomplete messages, because several threads may write at the same time.
MAX_PARTIAL = 8

#: Header of a chunk: bytes of data, pid, message number, part number, number of parts.
#: A chunk is one write, which contains a message or a part of a message.
_HEADER = Struct("<HIQHH")
_DATA_BYTES = CHUNK_BYTES - _HEADER.size
_MAX_PARTS = 0xFFFF

#: Names of the pipe and of the counters' file in the directory of a named channel.
_PIPE, _COUNTERS = "pipe", "counters"

#: Maximum number of children, and of reported starts, that the reader remembers.
#: A start that is still in its slot must be remembered. A forgotten start would be reported twice.
#: There are :data:`LOSS_SLOTS` slots.
_MAX_REMEMBERED = 2 * LOSS_SLOTS

#: States of the agent in :class:`SharedCounters`.
#: Children send no messages in the state ``ABSENT``.
UNDECIDED, PRESENT, ABSENT = 0, 1, 2

#: Number of forks by this process and its ancestors. The number selects the counter of a new child.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork)


class SharedCounters:
    """Shared memory of a worker and its children: loss counters, agent state, polling flag.

    Each child has its own counter, because two processes cannot increment one counter atomically.
    """

    #: Size of the memory in bytes: 4 for each counter, 4 for the agent's state, and 4 for
    #: :attr:`polling`.
    SIZE = 4 * (LOSS_SLOTS + 2)

    def __init__(self, descriptor: int = -1) -> None:
        self._numbers = memoryview(mmap.mmap(descriptor, self.SIZE)).cast("I")

    @property
    def agent(self) -> int:
        """The state of the agent: ``UNDECIDED``, ``PRESENT`` or ``ABSENT``."""
        return self._numbers[LOSS_SLOTS]

    @agent.setter
    def agent(self, state: int) -> None:
        self._numbers[LOSS_SLOTS] = state

    @property
    def polling(self) -> int:
        """1 while the parent reads at short intervals and searches for kept starts; else 0.

        While the value is 0, the parent waits for a message in the pipe, and would not notice a
        kept start.
        """
        return self._numbers[LOSS_SLOTS + 1]

    @polling.setter
    def polling(self, polling: int) -> None:
        self._numbers[LOSS_SLOTS + 1] = polling

    def add_lost(self, slot: int) -> None:
        """Add 1 to the counter ``slot``."""
        self._numbers[slot] = (self._numbers[slot] + 1) & 0xFFFFFFFF

    def lost(self) -> int:
        """Return the sum of all counters."""
        return sum(self._numbers[:LOSS_SLOTS])


class ChannelWriter:
    """Writes the messages of one process. Never waits and never raises ``OSError``.

    :param slot: index of the process's counter in ``counters``, and of its slot in ``starts``.
    :param starts: the slots for kept starts; ``None`` if the process sends each start at once.
    """

    def __init__(
        self,
        descriptor: int,
        counters: SharedCounters,
        slot: int,
        starts: KeptStarts | None = None,
    ) -> None:
        self._descriptor = descriptor
        self._counters = counters
        self._slot = slot
        self._starts = starts
        self._pid = os.getpid()
        # Message numbers grow from child to child, because an earlier child may have had the same
        # pid.
        self._number = _forks << 32
        #: Encoded chunks of the kept starts, at most one per thread.
        self._kept: list[bytes] = []
        if starts is not None:  # a killed child may have left a start in this slot
            starts.drop(slot)

    def send(self, message: bytes) -> bool:
        """Send a message and return ``True``. If a start is kept, send both in one write.

        If the message cannot be sent completely, count it as lost and return ``False``.
        """
        size = len(message)
        kept = self._take_kept() if self._kept else b""
        if kept and len(kept) + size > _DATA_BYTES:
            self._send_start(kept)
            kept = b""
        self._number = number = self._number + 1
        try:
            if size <= _DATA_BYTES:
                header = _HEADER.pack(size, self._pid, number, 0, 1)
                write(self._descriptor, kept + header + message)
                if kept:
                    self._drop_start()
                return True
            parts = -(-size // _DATA_BYTES)
            if parts <= _MAX_PARTS:
                for part in range(parts):
                    data = message[part * _DATA_BYTES : (part + 1) * _DATA_BYTES]
                    header = _HEADER.pack(len(data), self._pid, number, part, parts)
                    write(self._descriptor, header + data)
                return True
        except OSError:  # the pipe is full, or the parent has died
            pass
        except BaseException:  # e.g. a time limit of the task that expires between two parts
            self._count_lost_with(kept)
            raise
        self._count_lost_with(kept)
        return False

    def send_start(self, message: bytes) -> None:
        """Send the start of a run at once or, while the parent polls, with the next message.

        A start that is already kept is sent first.
        """
        starts = self._starts
        if starts is None or len(message) > MAX_MESSAGE_BYTES:
            self.send(message)
            return
        while self._kept:
            self._send_start(self._take_kept())
        self._number = number = self._number + 1
        chunk = _HEADER.pack(len(message), self._pid, number, 0, 1) + message
        starts.keep(self._slot, number, self._pid, message)
        self._kept.append(chunk)
        # The parent sets ``polling`` to 0 and then searches for kept starts once more.
        # So either this process reads 0 here, or the parent's last search finds the start.
        if not self._counters.polling:
            self._send_start(self._take_kept())

    def _take_kept(self) -> bytes:
        """Remove and return the oldest kept start; empty if another thread has taken the start."""
        try:
            return self._kept.pop(0)
        except IndexError:
            return b""

    def _send_start(self, kept: bytes) -> None:
        try:
            write(self._descriptor, kept)
        except BaseException as error:
            self.count_lost()
            if not isinstance(error, OSError):
                raise
        self._drop_start()

    def _drop_start(self) -> None:
        if self._starts is not None:
            self._starts.drop(self._slot)

    def _count_lost_with(self, kept: bytes) -> None:
        """Count a lost message. Count also the kept start of the same write, if there was one."""
        self.count_lost()
        if kept:
            self.count_lost()
            self._drop_start()

    def mark(self, message: bytes) -> None:
        """Send a message of one chunk. Do not count a loss if the message cannot be sent."""
        self._number = number = self._number + 1
        with suppress(OSError):
            write(self._descriptor, _HEADER.pack(len(message), self._pid, number, 0, 1) + message)

    def count_lost(self) -> None:
        """Add 1 to this process's counter of lost messages."""
        self._counters.add_lost(self._slot)


class ChannelReader:
    """Reads the messages in the parent, and joins their parts.

    :param starts: the shared memory with the kept starts of the children.
    """

    def __init__(self, descriptor: int, starts: KeptStarts) -> None:
        self._descriptor = descriptor
        self._starts = starts
        #: Message number and slot of each start that was kept at the last call of
        #: :meth:`kept_starts`.
        self._kept: dict[int, int] = {}
        #: The numbers of the messages that were read from ``starts``. Most of these messages arrive
        #: again, through the pipe. The values are not used.
        self._taken: dict[int, int] = {}
        self._buffer = b""
        self._partial: dict[int, dict[int, list[bytes]]] = {}
        self._last_number: dict[int, int] = {}
        #: Whether the last :meth:`read` emptied the pipe.
        self.empty = True
        #: Number of messages whose writer was killed, plus number of reads with an invalid header.
        self.lost = 0

    def fileno(self) -> int:
        """Return the descriptor, for ``wait_readable``."""
        return self._descriptor

    def read(self) -> list[tuple[int, bytes]]:
        """Return the next complete messages, each with its writer's pid, without waiting."""
        try:
            data = read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            data = b""
        self.empty = len(data) < READ_BYTES
        return self._split(self._buffer + data) if data else []

    @property
    def keeping(self) -> bool:
        """Whether :meth:`kept_starts` has found a start and not returned the start yet."""
        return any(number not in self._taken for number in self._kept)

    def kept_starts(self) -> list[tuple[int, bytes]]:
        """Return the starts that the previous call found, each with its writer's pid.

        Each start is returned once. Between two calls, :meth:`read` must empty the pipe. Thus a
        writer's earlier messages are returned before the writer's start.
        """
        previous, self._kept = self._kept, self._starts.numbers(_forks + 2)
        return self._take(previous) if previous else []

    def search_kept(self, matches: Callable[[bytes], bool]) -> list[tuple[int, bytes]]:
        """Return the matching starts not returned before, each with its writer's pid."""
        return self._take(self._starts.numbers(_forks + 2), matches)

    def forget(self, pid: int) -> None:
        """Drop the incomplete messages of a dead process.

        Only the process's last message is counted as lost here.
        The process itself has counted the earlier incomplete messages.
        """
        last = self._last_number.pop(pid, None)
        self.lost += last in self._partial.pop(pid, ())

    def _take(
        self, kept: Mapping[int, int], matches: Callable[[bytes], bool] = bool
    ) -> list[tuple[int, bytes]]:
        found = []
        for number, slot in kept.items():
            start = None if number in self._taken else self._starts.message(slot, number)
            if start is None:
                continue
            pid, message = start
            # A child that was killed after it sent the start has not dropped the start.
            if self._last_number.get(pid, 0) >= number:
                _remember(self._taken, number, pid)
            elif matches(message):
                _remember(self._taken, number, pid)
                found.append((pid, message))
        return found

    def _split(self, data: bytes) -> list[tuple[int, bytes]]:
        messages, position, end = [], 0, len(data)
        while end - position >= _HEADER.size:
            size, pid, number, part, parts = _HEADER.unpack_from(data, position)
            start = position + _HEADER.size
            if size > _DATA_BYTES or part >= parts:
                # Other code of the host has written to the pipe.
                # The position of the next header is unknown, so the rest of the data is dropped.
                self.lost += 1
                position = end
                break
            if start + size > end:
                break
            position = start + size
            if pid in self._last_number:
                self._last_number[pid] = number
            else:
                _remember(self._last_number, pid, number)
            if number in self._taken:
                del self._taken[number]
            elif parts == 1:
                messages.append((pid, data[start:position]))
            elif message := self._join(pid, number, part, parts, data[start:position]):
                messages.append((pid, message))
        self._buffer = data[position:]
        return messages

    def _join(self, pid: int, number: int, part: int, parts: int, data: bytes) -> bytes | None:
        """Keep a part of a message. Return the message if this was its last part."""
        incomplete = self._partial.setdefault(pid, {})
        if part == 0:
            while len(incomplete) >= MAX_PARTIAL:  # the writer has counted the oldest as lost
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


def _remember(remembered: dict[int, int], key: int, value: int) -> None:
    """Add an item, and drop the oldest one if there are too many."""
    if len(remembered) >= _MAX_REMEMBERED:
        del remembered[next(iter(remembered))]
    remembered[key] = value


class Channel:
    """A pipe with counters and kept starts. The parent makes the channel before it starts children.

    :param directory: the directory to make for a named pipe and the counters' file. Children that
        are not forked open both by name. ``None`` if the children are forked and inherit both.
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
        self._starts = KeptStarts(LOSS_SLOTS)
        self.reader = ChannelReader(read_end, self._starts)
        #: Pid of the parent.
        self.pid = os.getpid()
        self._epoch = fork.epoch()

    def is_own(self) -> bool:
        """Return whether this process made the channel."""
        return fork.epoch() == self._epoch

    def writer(self) -> ChannelWriter:
        """Return this process's writer. A child also closes its copy of the read end.

        With an open read end, the child's writes would not fail after the parent's death, but fill
        the pipe.
        """
        if not self.is_own() and self.reader.fileno() >= 0:
            close(self.reader.fileno())
            self.reader = ChannelReader(-1, self._starts)
        if self.is_own():
            return ChannelWriter(self._write_end, self.counters, 0)
        slot = 1 + _forks % (LOSS_SLOTS - 1)
        # Children that are not forked do not inherit this shared memory, so they keep no starts.
        starts = self._starts if self._directory is None else None
        return ChannelWriter(self._write_end, self.counters, slot, starts)

    def close(self) -> None:
        """Close both ends of the pipe, and remove the directory if this process made it."""
        for descriptor in (self.reader.fileno(), self._write_end):
            if descriptor >= 0:
                close(descriptor)
        self.remove()

    def remove(self) -> None:
        """Remove the directory, if this process made it."""
        if self._directory is not None and self.is_own():
            shutil.rmtree(self._directory, ignore_errors=True)

    def lost(self) -> int:
        """Return the losses that the writers and the reader have counted."""
        return self.counters.lost() + self.reader.lost


class NamedChannel:
    """The parent's named channel, opened in a child that was not forked and inherited nothing.

    :raises OSError: the directory does not exist, or no process has the read end open.
    """

    def __init__(self, directory: Path) -> None:
        self._write_end = os.open(directory / _PIPE, os.O_WRONLY | os.O_NONBLOCK)
        self.counters = _open_counters(directory)

    def writer(self) -> ChannelWriter:
        """Return this process's writer.

        The pid selects the counter. Two children may share a counter. A count is lost only if both
        children count at the same moment.
        """
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
    if set_size is None:  # on macOS, the kernel chooses the size, up to 64 KiB
        return 64 * 1024
    for size in (PIPE_BYTES, *_SMALLER_SIZES):
        try:
            return fcntl.fcntl(descriptor, set_size, size)
        except OSError:
            continue
    return fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ)
