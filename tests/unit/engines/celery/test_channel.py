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
from z4j_bare.engines.celery.kept_starts import MAX_MESSAGE_BYTES

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


@pytest.mark.parametrize("size", [0, 1, 300, CHUNK_BYTES - 18, CHUNK_BYTES - 17, 60_000, 200_000])
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
    channel.reader = module.ChannelReader(-1, channel._starts)
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


@pytest.fixture
def polled(channel):
    """A channel whose parent reads at short intervals, so that children keep starts."""
    channel.counters.polling = 1
    return channel


def from_child(channel, calls):
    """Call ``calls`` with the writer of a new child, and return what arrives in the pipe."""
    assert in_child(lambda: calls(channel.writer())) == 0
    return [message for _, message in read_all(channel)]


def kept(channel):
    """Return the starts that children keep, as the parent's next two searches find them."""
    found = channel.reader.kept_starts() + channel.reader.kept_starts()
    return [message for _, message in found]


def test_start_is_sent_with_next_message(polled):
    """A start is kept, and sent with the next message. The parent does not find it twice."""
    writes = []

    def calls(writer):
        module.write = lambda _descriptor, data: writes.append(data)
        writer.send_start(b"start")
        assert writes == []
        writer.send(b"end")
        assert len(writes) == 1
        posix.write(writer._descriptor, writes[0])

    assert from_child(polled, calls) == [b"start", b"end"]
    assert kept(polled) == []
    assert not polled.reader.keeping


def test_start_of_killed_child_is_found_once(polled):
    """A start that its child never sends is found at the second search, and only then."""
    assert from_child(polled, lambda writer: writer.send_start(b"start")) == []
    reader = polled.reader
    assert reader.kept_starts() == []
    assert reader.keeping
    ((pid, message),) = reader.kept_starts()
    assert (message, pid != os.getpid()) == (b"start", True)
    assert not reader.keeping
    assert kept(polled) == reader.search_kept(bool) == []


def test_found_start_is_dropped_from_pipe(polled):
    """A start that the parent has found does not arrive again with the end of the run."""
    order, orders = os.pipe()
    pid = os.fork()
    if not pid:
        writer = polled.writer()
        for start, end in ((b"first", b"second"), (b"third", b"fourth")):
            writer.send_start(start)
            os.read(order, 1)
            writer.send(end)
        os._exit(0)
    deadline = time.monotonic() + 10
    while not (found := polled.reader.search_kept(bool)) and time.monotonic() < deadline:
        pass
    assert found == [(pid, b"first")]
    os.write(orders, b"xx")
    os.waitpid(pid, 0)
    assert read_all(polled) == [(pid, b"second"), (pid, b"third"), (pid, b"fourth")]
    assert kept(polled) == []
    assert polled.reader._taken == {}
    os.close(order)
    os.close(orders)


def test_sent_start_that_was_not_dropped_is_ignored(polled):
    """A child that is killed between its write and the drop leaves no second start."""

    def calls(writer):
        writer._starts.drop = lambda _slot: None
        writer.send_start(b"start")
        writer.send(b"end")

    assert from_child(polled, calls) == [b"start", b"end"]
    assert kept(polled) == []
    assert not polled.reader.keeping


def test_start_is_sent_at_once_to_waiting_parent(channel):
    """While the parent waits for a message, a start is sent at once."""
    assert from_child(channel, lambda writer: writer.send_start(b"start")) == [b"start"]
    assert kept(channel) == []


def test_long_start_is_sent_at_once(polled):
    """A start that does not fit into its slot is sent at once; the longest that fits is kept."""
    longest = b"x" * MAX_MESSAGE_BYTES
    assert from_child(polled, lambda writer: writer.send_start(longest + b"x")) == [longest + b"x"]
    assert from_child(polled, lambda writer: writer.send_start(longest)) == []
    assert kept(polled) == [longest]


def test_second_start_sends_first(polled):
    """A start within a run, as of an eager task, keeps the order of the child's messages."""

    def calls(writer):
        writer.send_start(b"outer")
        writer.send_start(b"inner")
        writer.send(b"inner end")
        writer.send(b"outer end")

    assert from_child(polled, calls) == [b"outer", b"inner", b"inner end", b"outer end"]


def test_start_precedes_long_message(polled):
    """A start and a message that do not fit into one chunk arrive in this order."""
    for size in (CHUNK_BYTES - 60, CHUNK_BYTES - 30, 60_000):
        message = b"x" * size

        def calls(writer, message=message):
            writer.send_start(b"start")
            writer.send(message)

        assert from_child(polled, calls) == [b"start", message]


def test_start_that_does_not_fit_is_counted(polled):
    """If the pipe is full, both messages of a run are counted as lost."""

    def calls(writer):
        for size in (4000, 1):
            while writer.send(b"x" * size):
                pass
        writer.send_start(b"start")
        assert not writer.send(b"end")
        polled.counters.polling = 0
        writer.send_start(b"start")

    from_child(polled, calls)
    assert polled.lost() == 5
    assert kept(polled) == []


def test_new_child_drops_start_of_slot(polled):
    """A child does not inherit the start of the killed child that used its slot."""
    slot = 1 + (module._forks + 1) % (module.LOSS_SLOTS - 1)
    polled._starts.keep(slot, 1, 7, b"left")
    from_child(polled, lambda _writer: None)
    assert kept(polled) == []


def test_later_child_has_larger_numbers(polled):
    """A child with the pid of an earlier one is not mistaken for it."""
    numbers = []
    for _ in range(2):
        from_child(polled, lambda writer: writer.send_start(b"start"))
        numbers += polled._starts.numbers(module.LOSS_SLOTS)
    assert numbers[0] < numbers[-1]
    assert min(numbers) > 0xFFFFFFFF


def test_remembered_children_are_bounded(polled, monkeypatch):
    """The reader does not remember each child that a worker ever had."""
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 3)
    for _ in range(5):
        from_child(polled, lambda writer: writer.send(b"x"))
        from_child(polled, lambda writer: writer.send_start(b"start"))
        assert kept(polled) == [b"start"]
        for slot in polled._starts.numbers(module.LOSS_SLOTS).values():
            polled._starts.drop(slot)  # as the next child with this slot does
    assert len(polled.reader._last_number) == len(polled.reader._taken) == 3


def test_child_without_fork_keeps_no_start(tmp_path):
    """A child that is spawned sends starts at once, because it inherits no slot."""
    channel = Channel(tmp_path / "channel-1")
    channel.counters.polling = 1
    writer = module.NamedChannel(tmp_path / "channel-1").writer()
    writer.send_start(b"start")
    assert read_all(channel) == [(os.getpid(), b"start")]
    channel.close()


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
