"""The hosts of ``soak``: their processes, their disk, and what happens to them during the run."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support.crash_harness import read_leftovers
from z4j_bare.demo.process import HarnessError, until
from z4j_bare.demo.worker import worker_environment

if TYPE_CHECKING:
    from z4j_bare.demo.rest import Credentials

HOST = Path(__file__).with_name("inside") / "bench_soak.py"

#: Kinds of the events of a task, in the order in which a host records them.
KINDS = ("task.received", "task.started", "task.succeeded")

#: Size of the disk that can become full, in MiB.
DISK_MB = 64
#: Seconds for which the disk stays full.
FULL_SECONDS = 40.0
#: Seconds at the end of a run without drops, restarts and a full disk.
QUIET_SECONDS = 20.0
#: The file that fills the disk. The hosts do not count this file.
FILLER = "filler"

#: Rate of the restarted host as a share of the other host's rate.
RESTARTED_SHARE = 0.25

_START_TIMEOUT = 60.0
_END_TIMEOUT = 30.0
#: Seconds after the end of a run in which a host must have ended.
_SETTLE_TIMEOUT = 240.0


def schedule(
    seconds: float, *, drop: float = 0.0, restart: float = 0.0, full: float = 0.0
) -> list[tuple[float, str]]:
    """Return what happens during a run, by time: ``drop``, ``stop``, ``kill``, ``fill``, ``free``.

    :param drop: seconds between two drops of all connections; the first comes after half of them.
    :param restart: seconds between two restarts, in turn after a kill and after a stop.
    :param full: seconds between the starts of two periods with a full disk.
    """
    end = seconds - QUIET_SECONDS
    events = [(moment, "drop") for moment in _every(drop, drop / 2, end)]
    ends = ("kill", "stop")
    events += [
        (moment, ends[number % 2]) for number, moment in enumerate(_every(restart, restart, end))
    ]
    for moment in _every(full, full, end - FULL_SECONDS):
        events += [(moment, "fill"), (moment + FULL_SECONDS, "free")]
    return sorted(events)


def _every(interval: float, first: float, end: float) -> Iterable[float]:
    if interval > 0:
        for number in count():
            moment = first + number * interval
            if moment > end:
                return
            yield moment


class Disk:
    """A small file system that only the hosts see; a context manager.

    The disk is a tmpfs in a namespace of its own. This needs no root if the kernel lets every user
    make namespaces.

    :param home: the directory in which the hosts see the disk.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._holder: subprocess.Popen[bytes] | None = None

    def command(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs ``command`` in the namespace of this disk."""
        target = ["--target", str(self._pid())]
        return ["nsenter", "--user", "--mount", "--preserve-credentials", *target, "--", *command]

    def fill(self) -> None:
        """Write until no byte is free."""
        with (self.outside / FILLER).open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                with suppress(_NoSpaceError):
                    while True:
                        _write(file, bytes(size))

    def free(self) -> None:
        """Delete what :meth:`fill` wrote."""
        (self.outside / FILLER).unlink(missing_ok=True)

    @property
    def outside(self) -> Path:
        """The path of the disk for a process that is not in its namespace."""
        return Path(f"/proc/{self._pid()}/root{self._home}")

    def _pid(self) -> int:
        if self._holder is None:
            raise HarnessError("the disk is not mounted")
        return self._holder.pid

    def __enter__(self) -> Self:
        if missing := [each for each in ("unshare", "nsenter", "mount") if not shutil.which(each)]:
            raise HarnessError(f"a full disk needs {', '.join(missing)} (util-linux)")
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        mount = (
            f'mount -t tmpfs -o size={DISK_MB}m,mode=0700 z4j "$0" && touch "$0/ready" && read _'
        )
        self._holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(self._home)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            until(self._is_ready, "the small disk", timeout=_START_TIMEOUT)
            (self.outside / "ready").unlink()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _is_ready(self) -> bool:
        holder = self._holder
        if holder is None or holder.poll() is not None:
            raise HarnessError("this user cannot mount a disk in a namespace: use --full-disk 0")
        return (self.outside / "ready").exists()

    def __exit__(self, *_exc: object) -> None:
        if self._holder is not None:
            self._holder.kill()
            self._holder.communicate()


class _NoSpaceError(Exception):
    """The disk is full."""


def _write(file: Any, data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _NoSpaceError from None


class Host:
    """One process and the samples that it prints; a context manager."""

    def __init__(self, site: Site, name: str, rate: float, seconds: float) -> None:
        self.name = name
        self.rate = rate
        self.samples: list[dict[str, Any]] = []
        #: How the process ended: ``stop``, ``kill``, or ``end`` after its time.
        self.end = "end"
        self._process = subprocess.Popen(
            site.command(name, rate, seconds),
            env=site.environment(),
            stdout=subprocess.PIPE,
            stderr=site.log,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def last(self) -> dict[str, Any]:
        """The last sample; empty counters if there is none."""
        empty = {"produced": 0, "stored": 0, "buffered": 0, "lost": {}, "buffer_durable": True}
        return self.samples[-1] if self.samples else empty

    def stop(self) -> None:
        """Stop the process with SIGTERM, after its first sample."""
        self._finish("stop")

    def kill(self) -> None:
        """Kill the process with SIGKILL, after its first sample."""
        self._finish("kill")

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process.

        Raises ``HarnessError`` if it has not ended after ``seconds``.
        """
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise HarnessError(f"host {self.name} has not ended after {seconds:g} s") from None
        self._reader.join(5.0)

    def _finish(self, end: str) -> None:
        started = lambda: bool(self.samples) or self._process.poll() is not None  # noqa: E731
        until(started, f"the first sample of {self.name}", timeout=_START_TIMEOUT)
        self.end = end
        if end == "kill":
            self._process.kill()
        else:
            self._process.terminate()
        self.wait(_END_TIMEOUT)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.samples.append(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(5.0)


@dataclass
class Site:
    """What the processes of one mode share: the agent, the home, and perhaps a small disk."""

    mode: str
    agent: Credentials
    home: Path
    reconnect: float
    log: Any
    disk: Disk | None = None

    def command(self, name: str, rate: float, seconds: float) -> list[str]:
        """Return the command of one process."""
        numbers = map(str, (rate, seconds, self.reconnect))
        command = [sys.executable, str(HOST), self.mode, name, *numbers]
        return self.disk.command(command) if self.disk else command

    def environment(self) -> dict[str, str]:
        """Return the environment of a process."""
        root = str(HOST.parents[2])
        extra = {"PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
        return worker_environment({**self.agent.env(self.home), **extra})


class Pair:
    """The hosts of one mode, which share a home; a context manager.

    One host runs all the time, and its samples give the slopes. The other host, if there is one, is
    stopped and killed in turn, and a new process takes its place.
    """

    def __init__(self, site: Site, rate: float, seconds: float, *, restarted: bool) -> None:
        self.mode = site.mode
        self.site = site
        self.steady = Host(site, f"{site.mode}-0", rate, seconds)
        self.restarted: list[Host] = []
        #: Files and events that the hosts have left in their home.
        self.files: list[str] = []
        self.left: set[tuple[str, str]] = set()
        self._seconds = seconds
        if restarted:
            self._start_next()

    @property
    def hosts(self) -> list[Host]:
        """All processes of this mode."""
        return [self.steady, *self.restarted]

    def happen(self, what: str) -> None:
        """Apply one event of :func:`schedule`."""
        if what == "fill" and self.site.disk:
            self.site.disk.fill()
        elif what == "free" and self.site.disk:
            self.site.disk.free()
        elif what in ("stop", "kill") and self.restarted:
            self._end(what)
            self._start_next()

    def finish(self) -> None:
        """Stop the restarted host, and wait until the other one has sent what is left."""
        if self.restarted:
            self._end("stop")
        self.steady.wait(_SETTLE_TIMEOUT)
        home = self.site.disk.outside if self.site.disk else self.site.home
        self.files = sorted(each.name for each in home.rglob("*") if not each.is_dir())
        left, _ = read_leftovers(home)
        self.left = {(str(task_id), str(kind)) for task_id, kind in left}

    def _end(self, how: str) -> None:
        host = self.restarted[-1]
        if how == "kill":
            host.kill()
        else:
            host.stop()

    def _start_next(self) -> None:
        name = f"{self.mode}-{len(self.restarted) + 1}"
        rate = self.steady.rate * RESTARTED_SHARE
        self.restarted.append(Host(self.site, name, rate, self._seconds + _SETTLE_TIMEOUT))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for host in self.hosts:
            host.__exit__(*exc)


@dataclass
class Account:
    """The events of one process: what was recorded, what has arrived, and what is missing."""

    name: str
    end: str
    #: The number of events that must arrive unless they are reported as lost.
    expected: int
    arrived: int = 0
    #: The number of events that are still in a buffer file.
    buffered: int = 0
    missing: list[int] = field(default_factory=list)
    #: The largest number of missing events that the guarantees allow.
    allowed: int = 0
    #: The reported losses by reason.
    lost: dict[str, int] = field(default_factory=dict)


def unexplained(accounts: Iterable[Account]) -> int:
    """Return how many events are missing beyond those that were reported or only in memory.

    :param accounts: all accounts of one home, because a process also reports lost rows that it
        adopted.
    """
    missing = allowed = 0
    for each in accounts:
        missing += len(each.missing)
        allowed += each.allowed
    return max(0, missing - allowed)


def account(
    name: str,
    end: str,
    last: Mapping[str, Any],
    arrived: Iterable[int],
    buffered: Iterable[int] = (),
) -> Account:
    """Compare the last sample of a process with its events that have arrived or are buffered.

    A killed process loses its ring. A process without a working disk loses its rows.
    """
    found, left = set(arrived), set(buffered)
    expected = last["stored"] if end == "kill" else last["produced"]
    allowed = sum(last["lost"].values())
    if not last["buffer_durable"]:
        allowed += last["buffered"]
    somewhere = found | left
    missing = [number for number in range(expected) if number not in somewhere]
    waiting, lost = len(left - found), dict(last["lost"])
    return Account(name, end, expected, len(found), waiting, missing, allowed, lost)


def numbers_by_host(events: Iterable[tuple[str, str]]) -> dict[str, Counter[int]]:
    """Return how often each event has arrived: the host's name, and the number of the event.

    :param events: task id and kind of each event.
    """
    found: dict[str, Counter[int]] = {}
    for task_id, kind in events:
        name, _, task = task_id.rpartition("-")
        number = int(task) * len(KINDS) + KINDS.index(kind)
        found.setdefault(name, Counter())[number] += 1
    return found
