"""The channel of a prefork worker: whole messages, counted losses, and no waiting."""

import fcntl
import os
import posix
import signal
import subprocess
import sys
import time

import pytest

from tests.support.processes import in_child
from z4j_bare.engines.celery import channel as module
from z4j_bare.engines.celery.channel import (
    ABSENT,
    CHUNK_BYTES,
    MAX_PARTIAL,
    PIPE_BYTES,
    PRESENT,
    READ_BYTES,
    Channel,
)

#: Number of writers that are killed.
KILLED_WRITERS = 40


@pytest.fixture
def channel():
    made = Channel()
    yield made
    made.close()


def read_all(channel):
    """Return all complete messages in the channel, with the writers' pids."""
    messages = channel.reader.read()
    while not channel.reader.empty:
        messages += channel.reader.read()
    return messages


@pytest.mark.parametrize("size", [0, 1, 300, CHUNK_BYTES - 14, CHUNK_BYTES - 13, 60_000, 200_000])
def test_message_arrives_whole(channel, size):
    """A message of any size arrives as it was sent, with the writer's pid."""
    message = os.urandom(size)
    assert channel.writer().send(message)
    assert read_all(channel) == [(os.getpid(), message)]
    assert channel.lost() == 0


def test_messages_keep_order_across_reads(channel):
    """Messages arrive in order, also if a read ends amid one."""
    writer = channel.writer()
    sent = [b"%d" % number * (number % 1300 + 1) for number in range(400)]
    assert sum(map(len, sent)) > 2 * READ_BYTES
    for message in sent:
        writer.send(message)
    assert [message for _, message in read_all(channel)] == sent


def test_channel_holds_one_second_of_a_fast_worker(channel):
    """A parent that stands still for a second loses none of 1,000 messages of 1 KB."""
    if channel.size < PIPE_BYTES:
        pytest.skip("the kernel refuses this user a pipe of 1 MiB")
    writer = channel.writer()
    assert all(writer.send(b"x" * 1000) for _ in range(1000))
    assert len(read_all(channel)) == 1000


def test_full_channel_counts_losses_and_does_not_wait(channel):
    """What does not fit is counted; what fits again arrives."""
    writer, sent, started = channel.writer(), 0, time.monotonic()
    while writer.send(b"x" * 4000):
        sent += 1
    assert not writer.send(b"y" * 4000)
    writer.mark(b"need not arrive" * 250)
    assert time.monotonic() - started < 2
    assert channel.lost() == 2
    assert len(read_all(channel)) == sent
    assert writer.send(b"z")
    assert read_all(channel) == [(os.getpid(), b"z")]
    assert channel.lost() == 2


def test_long_message_that_fits_in_part_is_lost_whole(channel):
    """A message of which only some chunks fit is counted once and never appears."""
    writer, sent = channel.writer(), 0
    while writer.send(b"x" * 50_000):
        sent += 1
    messages = read_all(channel)
    assert len(messages) == sent
    assert writer.send(b"y" * 50_000)
    assert [len(message) for _, message in read_all(channel)] == [50_000]
    channel.reader.forget(os.getpid())
    assert channel.lost() == 1


def test_each_child_counts_in_its_own_slot(channel):
    """Losses of children are in shared memory, each in a slot of its own."""
    writer = channel.writer()
    while writer.send(b"x" * 4000):
        pass
    for _ in range(3):
        assert in_child(lambda: channel.writer().send(b"y" * 4000)) == 0
    assert channel.lost() == 4
    numbers = channel.counters._numbers
    assert sum(1 for number in numbers if number) == 4


def test_child_sees_state_of_agent(channel):
    """A child sees what the parent sets after the fork."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(read_end, 1)
        os._exit(0 if channel.counters.agent == ABSENT else 1)
    channel.counters.agent = PRESENT
    channel.counters.agent = ABSENT
    os.write(write_end, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(read_end)
    os.close(write_end)


def test_child_outlives_parent_without_error():
    """A child whose parent is gone neither waits nor raises, and counts."""
    channel = Channel()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            writer = channel.writer()
            while channel.counters.agent != PRESENT:  # until the parent has closed its end
                pass
            status = int(writer.send(b"x") or channel.counters.lost() != 1)
        finally:
            os._exit(status)
    posix.close(channel.reader.fileno())  # os.close of gevent closes later
    channel.counters.agent = PRESENT
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    channel.reader = module.ChannelReader(-1)
    channel.close()


def test_killed_writers_leave_only_whole_messages(channel):
    """Writers that get SIGKILL amid their messages leave whole messages, each in order."""
    messages = {}

    def collect(seconds=0.0):
        end = time.monotonic() + seconds
        while True:
            for writer, message in channel.reader.read():
                messages.setdefault(writer, []).append(message)
            if channel.reader.empty and time.monotonic() > end:
                break

    for number in range(KILLED_WRITERS):
        pid = os.fork()
        if not pid:
            writer = channel.writer()
            for each in range(1_000_000):
                writer.send(b"%08d" % each * (1 + (each * 7 + number) % 3 * 700))
            os._exit(1)
        collect(0.003 + number * 0.0003)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        collect()
        channel.reader.forget(pid)
    assert len(messages) > KILLED_WRITERS // 2
    for received in messages.values():
        numbers = [int(message[:8]) for message in received]
        assert numbers == sorted(set(numbers))
        for message in received:
            assert message == message[:8] * (len(message) // 8)
    assert channel.reader._partial == {}


def test_named_channel_serves_processes_that_inherit_nothing(tmp_path):
    """A process that was not forked sends, counts and sees the agent's state by the names alone."""
    directory = tmp_path / "channel-1"
    channel = Channel(directory)
    assert [path.stat().st_mode & 0o777 for path in (directory, *directory.iterdir())] == [
        0o700,
        0o600,
        0o600,
    ]
    channel.counters.agent = PRESENT
    program = (
        "import sys, pathlib\n"
        "from z4j_bare.engines.celery.channel import NamedChannel\n"
        "channel = NamedChannel(pathlib.Path(sys.argv[1]))\n"
        "assert channel.counters.agent == 1\n"
        "writer = channel.writer()\n"
        "writer.send(b'x' * 10_000)\n"
        "while writer.send(b'y' * 4000): pass\n"
    )
    subprocess.run([sys.executable, "-c", program, str(directory)], check=True, timeout=60)
    assert channel.lost() == 1
    assert read_all(channel)[0][1] == b"x" * 10_000
    channel.close()
    assert not directory.exists()
    with pytest.raises(FileNotFoundError):
        module.NamedChannel(directory)


def test_foreign_bytes_are_counted(channel):
    """Bytes that another program wrote to the descriptor cost what was read with them."""
    os.write(channel._write_end, b"\xff" * 100)
    assert read_all(channel) == []
    assert channel.lost() == 1
    assert channel.writer().send(b"x")
    assert read_all(channel) == [(os.getpid(), b"x")]


def test_incomplete_messages_are_bounded(channel):
    """A child whose messages are never completed does not fill the parent's memory."""
    for number in range(5 * MAX_PARTIAL):
        os.write(channel._write_end, module._HEADER.pack(1, 7, number, 0, 2) + b"x")
    assert read_all(channel) == []
    assert len(channel.reader._partial[7]) == MAX_PARTIAL
    channel.reader.forget(7)
    assert channel.lost() == 1


def test_refused_size_falls_back(monkeypatch):
    """Where the kernel refuses 1 MiB the channel is smaller, and works."""
    real = fcntl.fcntl

    def refuse(descriptor, command, argument=0):
        if command == fcntl.F_SETPIPE_SZ and argument > 128 * 1024:
            raise PermissionError
        return real(descriptor, command, argument)

    monkeypatch.setattr(module.fcntl, "fcntl", refuse)
    small = Channel()
    assert small.size == 128 * 1024
    assert small.writer().send(b"x" * 50_000)
    assert [len(message) for _, message in read_all(small)] == [50_000]
    small.close()
