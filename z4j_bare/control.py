"""A process and its agent from outside: pid files, the desk at which other processes ask, SIGHUP, exit hooks.

Each running agent has a desk, a Unix socket beside its pid file in ``Z4J_HOME`` (``loops/desk.py`` is its other side). So
no host's signals are touched: SIGHUP restarts a Celery worker and ends a gunicorn one.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from z4j_core.paths import ensure_z4j_home

from z4j_bare.concurrency.files import open_file

#: Words that a desk understands.
STATUS, RESTART = "status", "restart"

#: Seconds for a desk's answer.
PATIENCE = 2.0

#: Bytes of a socket's path, its closing zero included, that every kernel takes.
_LONGEST_PATH = 104

_DESK = re.compile(r"agent-(?P<adapter>.+)\.(?P<pid>\d+)-[0-9a-f]+\.sock")


@dataclass(frozen=True, slots=True)
class Desk:
    """Where one agent can be asked: the one of ``adapter`` in process ``pid``, which may have died since."""

    adapter: str
    pid: int
    path: Path

    def ask(self, word: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Say one word and return what the agent answers.

        Raises ``OSError``: ``ConnectionRefusedError`` or ``FileNotFoundError`` when the agent is gone, ``TimeoutError``
        when it has not answered within ``timeout`` seconds.
        """
        with _dialled(self.path, timeout) as line:
            line.sendall(f"{word}\n".encode())
            answer = b"".join(iter(lambda: line.recv(65536), b""))
        try:
            found: dict[str, Any] = json.loads(answer)
        except ValueError:
            raise ConnectionResetError(f"process {self.pid} left while it was asked") from None
        return found

    def post(self, word: str) -> None:
        """Say a word and do not wait. Raises ``OSError``."""
        with _dialled(self.path, 0.0) as line:
            line.send(f"{word}\n".encode())


def desks(adapter_id: str | None = None) -> list[Desk]:
    """Return the desks in ``Z4J_HOME``, of one adapter or of all, sorted by adapter and pid."""
    found = []
    for path in _runtime_dir().glob("agent-*.sock"):
        match = _DESK.fullmatch(path.name)
        if match and adapter_id in (None, match["adapter"]):
            found.append(Desk(match["adapter"], int(match["pid"]), path))
    return sorted(found, key=lambda desk: (desk.adapter, desk.pid, desk.path.name))


def status() -> list[dict[str, Any]]:
    """Ask every agent of this ``Z4J_HOME`` how it is.

    An agent that does not answer is told of by its ``adapter``, ``pid`` and ``error``; what the dead have left is removed.
    """
    return [_asked(desk) for desk in desks() if not _buried(desk)]


def send_restart(adapter_id: str) -> tuple[int, str]:
    """Have every agent of this adapter end its session and connect anew.

    Returns an exit code and what to tell the operator: 0 when all that run were told, 1 when none runs or one does not
    answer, 2 where there are no Unix sockets.
    """
    if os.name != "posix":
        return (
            2,
            "agents cannot be reached from outside on this platform: restart the process that hosts the agent",
        )
    answers = [_asked(desk, RESTART) for desk in desks(_word(adapter_id)) if not _buried(desk)]
    _remove_stale(adapter_id)
    told = ", ".join(str(answer["pid"]) for answer in answers if "error" not in answer)
    silent = ", ".join(
        f"{answer['pid']} ({answer['error']})" for answer in answers if "error" in answer
    )
    if silent:
        return 1, f"no good answer from process {silent}; told: {told or 'none'}"
    if not told:
        return 1, f"no agent of {adapter_id} runs here; looked in {_runtime_dir()}"
    return 0, f"process {told}: the agent ends its session and connects anew"


def pidfile_path(adapter_id: str) -> Path:
    """Return where the pid of the first agent of this adapter is kept."""
    return _runtime_dir() / f"agent-{_word(adapter_id)}.pid"


def write_pidfile(adapter_id: str) -> Path:
    """Write our pid down and return the file: the adapter's own, or one beside it if another live process has that."""
    first = pidfile_path(adapter_id)
    path = first if _vacant(first) else first.with_name(f"{first.stem}.{os.getpid()}.pid")
    written = path.with_name(f"{path.name}.{token_hex(6)}.tmp")
    # A new file, never through a link: somebody else may be able to write this directory.
    with open(written, "x", encoding="ascii", opener=partial(open_file, mode=0o600)) as file:
        file.write(f"{os.getpid()}\n")
    written.replace(path)
    return path


def remove_pidfile(adapter_id: str) -> None:
    """Remove the pid files of this adapter that hold our pid; never another process's."""
    for path in _pidfiles(adapter_id):
        if _pid_in(path) == os.getpid():
            path.unlink(missing_ok=True)


def install_sighup_handler(runtime: Any) -> bool:
    """Let SIGHUP end the session and connect anew; return whether it was possible. Only for a process of the agent's own.

    The handler says ``restart`` at this process's desks and calls whatever handler there was before. Nothing in it can
    wait or switch greenlets. A second call changes nothing.
    """
    del runtime  # the handler finds every agent of this process
    if not hasattr(signal, "SIGHUP"):
        return False
    previous = signal.getsignal(signal.SIGHUP)
    if isinstance(previous, _Hangup):
        return True
    try:
        signal.signal(signal.SIGHUP, _Hangup(previous))
    except ValueError:  # not the main thread
        return False
    return True


def register_shutdown_atexit(callback: Callable[[], object]) -> str:
    """Run ``callback`` once at interpreter exit; return ``"threading"`` or ``"atexit"``, whichever hook is the first.

    Both are set. ``threading._register_atexit`` runs before concurrent.futures joins its workers, but never under eventlet,
    whose patched ``threading`` keeps another list than the one that is run (``z4j-1.13-behaviour`` 7.8).
    """
    ran = threading.Event()

    def once() -> None:
        if not ran.is_set():
            ran.set()
            callback()

    atexit.register(once)
    try:
        threading._register_atexit(once)  # type: ignore[attr-defined]  # noqa: SLF001 - no public equivalent
    except (AttributeError, RuntimeError, TypeError):
        return "atexit"
    return "threading"


def new_desk_path(adapter_id: str) -> Path:
    """Return an unused name for a desk of this process, and remove those that the dead have left."""
    for desk in desks(_word(adapter_id)):
        _buried(desk)
    # Random, for in containers that share a volume every process has pid 1.
    return _runtime_dir() / f"agent-{_word(adapter_id)}.{os.getpid()}-{token_hex(3)}.sock"


@contextmanager
def address(path: Path) -> Iterator[str]:
    """Yield an address of the socket ``path`` that is short enough for the kernel."""
    if len(os.fsencode(path)) < _LONGEST_PATH:
        yield str(path)
        return
    directory = open_file(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class _Hangup:
    """A SIGHUP handler; ``previous`` is the one that it stands in for."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: Any) -> None:
        for desk in desks():
            if desk.pid == os.getpid():
                with suppress(OSError):
                    desk.post(RESTART)
        if callable(self._previous):
            self._previous(number, frame)


@contextmanager
def _dialled(path: Path, timeout: float) -> Iterator[Any]:
    # The C class, which nobody patches: a signal handler must not switch greenlets.
    import _socket

    line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        line.settimeout(timeout)
        with address(path) as short:
            line.connect(short)
        yield line
    finally:
        line.close()


def _asked(desk: Desk, word: str = STATUS) -> dict[str, Any]:
    try:
        answer = desk.ask(word)
    except OSError as error:
        answer = {"error": str(error) or type(error).__name__}
    return {"adapter": desk.adapter, "pid": desk.pid, **answer}


def _buried(desk: Desk) -> bool:
    """Remove a desk that nobody serves any more; return whether it was one. Never waits: a fork of the host would, too."""
    try:
        with _dialled(desk.path, 0.0):
            return False
    except (ConnectionRefusedError, FileNotFoundError):
        desk.path.unlink(missing_ok=True)
        return True
    except OSError:
        return False


def _remove_stale(adapter_id: str) -> None:
    for path in _pidfiles(adapter_id):
        if not _alive(_pid_in(path)):
            path.unlink(missing_ok=True)


def _pidfiles(adapter_id: str) -> list[Path]:
    first = pidfile_path(adapter_id)
    return [path for path in (first, *first.parent.glob(f"{first.stem}.*.pid")) if path.exists()]


def _vacant(path: Path) -> bool:
    return not _alive(_pid_in(path))


def _pid_in(path: Path) -> int:
    """Return the pid in a file, 0 when there is none."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _word(adapter_id: str) -> str:
    """Return a framework's name as part of a file's name."""
    return re.sub(r"[^\w-]", "_", adapter_id)


def _runtime_dir() -> Path:
    """Return ``Z4J_HOME``, created if it is missing; z4j_django reads it under this name."""
    return ensure_z4j_home()
