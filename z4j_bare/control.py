"""Controls running agents: pid files, control sockets, SIGHUP and exit hooks.

Each running agent serves a Unix socket in ``Z4J_HOME`` (``z4j_bare.monitoring.control_server``). A
signal cannot replace the socket, because SIGHUP restarts a Celery worker and stops a gunicorn
worker.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.fork import open_file
from z4j_bare.home import ensure_home, settle_home

if TYPE_CHECKING:
    from _socket import socket
    from types import FrameType

#: Requests that a control server answers.
STATUS, RESTART, TASKS, HUB = "status", "restart", "tasks", "hub"
LOG, METRICS = "log", "metrics"

#: Seconds to wait for each part of an answer.
REQUEST_TIMEOUT = 2.0

#: Maximum bytes of a socket path that every kernel accepts, including the terminating NUL.
_MAX_PATH_BYTES = 104

#: The framework adapter's name in a process without a framework.
_PLAIN_ADAPTER = "bare"

_SOCKET_NAME = re.compile(r"agent-(?P<adapter>.+)\.(?P<pid>\d+)-[0-9a-f]+\.sock")


@dataclass(frozen=True, slots=True)
class ControlClient:
    """A client of one agent's control socket. The agent may have ended.

    :param adapter: framework adapter of the agent, such as ``bare`` or ``django``.
    """

    adapter: str
    pid: int
    path: Path

    def request(
        self,
        verb: str,
        timeout: float = REQUEST_TIMEOUT,
        parameters: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Send a request and return the agent's answer.

        ``timeout`` limits each wait for a part of the answer, in seconds.

        Raises ``ConnectionRefusedError`` or ``FileNotFoundError`` if the agent has ended,
        ``TimeoutError`` if a part is late, and another ``OSError`` if the socket fails.
        """
        with _connected(self.path, timeout) as sock:
            text = f" {json.dumps(parameters)}" if parameters else ""
            sock.sendall(f"{verb}{text}\n".encode())
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        try:
            parsed: dict[str, Any] = json.loads(answer)
        except ValueError:
            raise ConnectionResetError(
                f"process {self.pid} ended before it sent a complete answer"
            ) from None
        return parsed

    def send(self, verb: str) -> None:
        """Send a request without waiting for the answer. Raises ``OSError``."""
        with _connected(self.path, 0.0) as sock:
            sock.send(f"{verb}\n".encode())


#: Calls a function with each client and returns the results in the order of the clients.
Apply = Callable[[Callable[[ControlClient], dict[str, Any]], list[ControlClient]], Iterator[Any]]


def list_clients(adapter_id: str | None = None) -> list[ControlClient]:
    """Return a client for each control socket in ``Z4J_HOME``, sorted by adapter and pid.

    :param adapter_id: the framework adapter whose sockets to list; default: all.
    """
    clients = []
    for path in settle_home(create=False).glob("agent-*.sock"):
        match = _SOCKET_NAME.fullmatch(path.name)
        if match and adapter_id in (None, match["adapter"]):
            clients.append(ControlClient(match["adapter"], int(match["pid"]), path))
    return sorted(clients, key=lambda client: (client.adapter, client.pid, client.path.name))


def status() -> list[dict[str, Any]]:
    """Return the status of every agent with this ``Z4J_HOME``; remove stale sockets.

    The status of an agent that does not answer has only ``adapter``, ``pid`` and ``error``.
    """
    return query(STATUS)


def query(
    verb: str,
    parameters: Mapping[str, object] | None = None,
    timeout: float = REQUEST_TIMEOUT,
    apply: Apply = map,
) -> list[dict[str, Any]]:
    """Send a request to every agent of this ``Z4J_HOME`` and return the answers.

    An agent that does not answer is reported with ``adapter``, ``pid`` and ``error`` only.
    Sockets and pid files of ended processes are removed.

    :param apply: calls a function with each client: ``map``, or the ``map`` of a thread pool, with
        which several agents are queried at the same time.
    """
    remove_stale_pidfiles()
    clients = [client for client in list_clients() if not _remove_if_stale(client)]
    request = partial(_query, verb=verb, parameters=parameters, timeout=timeout)
    return list(apply(request, clients))


def send_restart(adapter_id: str) -> tuple[int, str]:
    """Make every agent of this adapter close its session and reconnect.

    Returns an exit code and a message for the operator. The code is 0 if every running agent
    accepted the request. The code is 1 if no agent runs or one did not answer, and 2 on a platform
    without Unix sockets.
    """
    if os.name != "posix":
        message = "this platform has no Unix sockets to reach an agent: restart the worker process"
        return 2, message
    clients = [each for each in list_clients(safe_name(adapter_id)) if not _remove_if_stale(each)]
    answers = [_query(client, RESTART) for client in clients]
    remove_stale_pidfiles()
    accepted = ", ".join(str(answer["pid"]) for answer in answers if "error" not in answer)
    failed = ", ".join(
        f"{answer['pid']} ({answer['error']})" for answer in answers if "error" in answer
    )
    if failed:
        return 1, f"no valid answer from process {failed}; reconnecting: {accepted or 'none'}"
    if not accepted:
        return 1, f"no {adapter_id} agent runs with Z4J_HOME={settle_home(create=False)}"
    return 0, f"process {accepted}: the agent closes its session and reconnects"


def pidfile_path(adapter_id: str) -> Path:
    """Return the path of the pid file of the first agent of this adapter."""
    return _runtime_dir() / _pidfile_name(adapter_id)


def write_pidfile(adapter_id: str) -> Path:
    """Write a pid file for this process and return its path.

    If the file of :func:`pidfile_path` belongs to another live process, this function writes a
    second file. The name of the second file contains the pid of this process.
    """
    first = pidfile_path(adapter_id)
    path = first if _is_free(first) else first.with_name(f"{first.stem}.{os.getpid()}.pid")
    temporary = path.with_name(f"{path.name}.{token_hex(6)}.tmp")
    # Another user with write access may have created a symlink. Mode "x" never follows a symlink.
    with open(temporary, "x", encoding="ascii", opener=partial(open_file, mode=0o600)) as file:
        file.write(f"{os.getpid()}\n")
    temporary.replace(path)
    return path


def remove_pidfile(adapter_id: str) -> None:
    """Remove the pid files of this adapter that contain the pid of this process."""
    for path in _pidfiles(adapter_id):
        if _read_pid(path) == os.getpid():
            path.unlink(missing_ok=True)


def is_pidfile_safe(adapter_id: str) -> bool:
    """Whether this process may have a pid file. Commands may send SIGHUP to the pid in the file.

    ``restart`` of z4j-bare 1.13.0 sends SIGHUP. The signal ends a process that neither handles nor
    ignores SIGHUP. Therefore such a process has no pid file, unless a framework's own commands,
    such as ``manage.py z4j_status``, read the file.
    """
    if adapter_id != _PLAIN_ADAPTER or not hasattr(signal, "SIGHUP"):
        return True
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL


def remove_stale_pidfiles() -> None:
    """Remove the pid files of all ended processes from ``Z4J_HOME``.

    The pid of a process in another container that shares the directory cannot be checked. The pid
    file of such a process stays while the control socket of the process accepts connections.
    """
    ended = [path for path in settle_home(create=False).glob("agent-*.pid") if _is_free(path)]
    if not ended:
        return
    reachable = {client.pid for client in list_clients() if not _remove_if_stale(client)}
    for path in ended:
        if _read_pid(path) not in reachable and _is_free(path):
            path.unlink(missing_ok=True)


def install_sighup_handler(runtime: object) -> bool:
    """Make SIGHUP reconnect every agent of this process.

    Must be called only in a process that runs nothing but the agent. The handler sends ``restart``
    to the control sockets of this process without waiting, and then calls the previous handler. A
    second call of this function has no effect.

    :param runtime: not used.
    :returns: whether the handler is installed; ``False`` outside the main thread, and on a platform
        without SIGHUP.
    """
    del runtime  # the handler finds every agent of this process by its socket
    if not hasattr(signal, "SIGHUP"):
        return False
    previous = signal.getsignal(signal.SIGHUP)
    if isinstance(previous, _SighupHandler):
        return True
    try:
        signal.signal(signal.SIGHUP, _SighupHandler(previous))
    except ValueError:  # not the main thread
        return False
    return True


def register_shutdown_atexit(callback: Callable[[], object]) -> str:
    """Run ``callback`` once at interpreter exit.

    Two hooks are registered. The hook of ``threading._register_atexit`` runs first, before
    ``concurrent.futures`` joins its workers. Under eventlet this hook never runs, because the
    interpreter does not read the callbacks of a patched ``threading``. In that case the ``atexit``
    hook runs the callback.

    :returns: ``"threading"`` if both hooks are registered, else ``"atexit"``.
    """
    ran = threading.Event()

    def run_once() -> None:
        if not ran.is_set():
            ran.set()
            callback()

    atexit.register(run_once)
    try:
        threading._register_atexit(run_once)  # type: ignore[attr-defined]  # noqa: SLF001
    except (AttributeError, RuntimeError, TypeError):
        return "atexit"
    return "threading"


def new_socket_path(adapter_id: str) -> Path:
    """Return an unused socket path for this process and remove stale sockets of the adapter."""
    for client in list_clients(safe_name(adapter_id)):
        _remove_if_stale(client)
    # Containers that share a volume may all use pid 1, so the name needs a random part.
    return _runtime_dir() / f"agent-{safe_name(adapter_id)}.{os.getpid()}-{token_hex(3)}.sock"


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Yield an address of the socket ``path`` that fits into the kernel's limit."""
    if len(os.fsencode(path)) < _MAX_PATH_BYTES:
        yield str(path)
        return
    directory = open_file(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class _SighupHandler:
    """A SIGHUP handler that reconnects the agents and then calls the ``previous`` handler."""

    def __init__(self, previous: object) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for client in list_clients():
            if client.pid == os.getpid():
                with suppress(OSError):
                    client.send(RESTART)
        if callable(self._previous):
            self._previous(number, frame)


@contextmanager
def _connected(path: Path, timeout: float) -> Iterator[socket]:
    # The C class is never patched.
    # A patched socket would switch greenlets. A signal handler must not switch greenlets.
    import _socket

    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        with socket_address(path) as short:
            sock.connect(short)
        yield sock
    finally:
        sock.close()


def _query(
    client: ControlClient,
    verb: str = STATUS,
    parameters: Mapping[str, object] | None = None,
    timeout: float = REQUEST_TIMEOUT,
) -> dict[str, Any]:
    try:
        answer = client.request(verb, timeout, parameters)
    except PermissionError:
        answer = {"error": "this user may not use the agent's socket: run the command as its user"}
    except OSError as error:
        answer = {"error": error.strerror or str(error) or type(error).__name__}
    return {"adapter": client.adapter, "pid": client.pid, **answer}


def _remove_if_stale(client: ControlClient) -> bool:
    """Remove a socket that no process serves; return whether it was removed.

    Must not wait. The function runs on a native thread, and a fork of the host waits for that
    thread.
    """
    try:
        with _connected(client.path, 0.0):
            return False
    except (ConnectionRefusedError, FileNotFoundError):
        client.path.unlink(missing_ok=True)
        return True
    except OSError:
        return False


def _pidfiles(adapter_id: str) -> list[Path]:
    first = settle_home(create=False) / _pidfile_name(adapter_id)
    return [path for path in (first, *first.parent.glob(f"{first.stem}.*.pid")) if path.exists()]


def _is_free(path: Path) -> bool:
    """Return whether the pid in this file belongs to no live process."""
    return not is_alive(_read_pid(path))


def _read_pid(path: Path) -> int:
    """Return the pid in a file, or 0 when it contains none."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def is_alive(pid: int) -> bool:
    """Return whether a process with this pid exists."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def safe_name(adapter_id: str) -> str:
    """Return an adapter's name for use in a file name: only letters, digits, ``_`` and ``-``."""
    return re.sub(r"[^\w-]", "_", adapter_id)


def _pidfile_name(adapter_id: str) -> str:
    return f"agent-{safe_name(adapter_id)}.pid"


def _runtime_dir() -> Path:
    """Return ``Z4J_HOME``, created if it is missing; z4j_django imports this function."""
    # A command that only reads must not create a replacement for an unusable directory.
    return ensure_home(create=False)
