"""Serves ``z4j-bare status``, ``tasks`` and similar commands on a Unix socket.

``control.py`` is the client.
"""

from __future__ import annotations

import _socket  # the C class is never patched; every wait uses the backend
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any

from z4j_bare import control

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.interfaces import IEvent

logger = logging.getLogger("z4j.runtime.monitoring.control_server")

#: Maximum seconds to wait for a client's request, and for each write of the response.
CLIENT_TIMEOUT = 2.0

#: Maximum seconds between two checks of the stop event.
#: :meth:`ControlServer.wake` causes an earlier check.
STOP_POLL_INTERVAL = 60.0

#: Maximum bytes of a request.
MAX_REQUEST_BYTES = 1024

#: Bytes of a streamed response that are collected before they are sent.
CHUNK_BYTES = 16 * 1024

#: The user id of root. Root may ask, because root can read the memory of every process anyway.
_ROOT = 0

#: Layout of the value of ``SO_PEERCRED``: pid, user id and group id of the client.
_CREDENTIALS = Struct("3i")

#: A response: a document, or the parts of a JSON text that is too large for one step of a hub.
Response = dict[str, Any] | Iterator[str]


class ControlServer:
    """Serves one client at a time. Without a client the server uses almost no CPU.

    :param adapter: the framework adapter's name, which is part of the socket's file name.
    :param handlers: maps each verb to the function that returns the response. The parameters of the
        request are the function's keywords.
    """

    def __init__(
        self,
        adapter: str,
        handlers: Mapping[str, Callable[..., Response]],
        backend: BaseConcurrency,
    ) -> None:
        self._adapter = adapter
        self._handlers = handlers
        self._backend = backend
        self._listener: _socket.socket | None = None
        self._files: list[Path] = []

    def run(self, stop_event: IEvent) -> None:
        """Serve until ``stop_event`` is set and :meth:`wake` is called."""
        ok, error = self._backend.offload(self._open)
        try:
            if ok:
                self._accept_loop(stop_event)
            else:
                logger.info(
                    "z4j: `z4j-bare status` and `restart` cannot reach this agent,"
                    " because it has no control socket: %s",
                    error,
                )
                self._backend.wait(stop_event)
        finally:
            if self._listener is not None:
                self._listener.close()
            # In a forked child ``offload`` raises an exception, so the child cannot remove the
            # parent's files.
            self._backend.offload(_unlink, self._files)

    def wake(self) -> None:
        """Send an empty request, so that the loop checks its stop event. Never waits."""
        with suppress(OSError, IndexError):
            control.ControlClient(self._adapter, 0, self._files[-1]).send("")

    def _open(self) -> None:
        control.remove_stale_pidfiles()
        if control.is_pidfile_safe(self._adapter):
            self._files.append(control.write_pidfile(self._adapter))
        if not hasattr(_socket, "AF_UNIX"):
            raise OSError("this platform has no Unix sockets")
        path = control.new_socket_path(self._adapter)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            self._listen(listener, path)
        except BaseException:
            listener.close()
            raise
        self._listener = listener

    def _listen(self, listener: _socket.socket, path: Path) -> None:
        """Bind under a temporary name, because clients remove a socket that does not listen."""
        unfinished = path.with_suffix(".tmp")
        self._files.append(unfinished)
        listener.setblocking(False)
        with control.socket_address(unfinished) as address:
            listener.bind(address)
        unfinished.chmod(0o600)
        listener.listen(8)
        unfinished.rename(path)
        self._files[-1] = path

    def _accept_loop(self, stop_event: IEvent) -> None:
        while self._listener is not None and not stop_event.is_set():
            if self._backend.wait_readable(self._listener, STOP_POLL_INTERVAL):
                self._accept(self._listener)

    def _accept(self, listener: _socket.socket) -> None:
        try:
            descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
        except OSError:  # the listener is closed, or the client has disconnected
            return
        client = _socket.socket(fileno=descriptor)
        try:
            client.setblocking(False)
            if _may_ask(client):
                self._handle(client)
        except OSError as error:
            logger.debug("z4j: control client disconnected: %s", error)
        except Exception:
            logger.exception("z4j: a request failed; please report this bug of z4j-bare")
        finally:
            client.close()

    def _handle(self, client: _socket.socket) -> None:
        verb, _, parameters = self._read_request(client).partition(" ")
        if not verb:
            return
        response = self._respond(verb, parameters)
        if isinstance(response, dict):
            self._send(client, json.dumps(response, default=str))
            return
        text = ""
        for part in response:
            text += part
            if len(text) >= CHUNK_BYTES:
                if not self._send(client, text):
                    return
                text = ""
        self._send(client, text)

    def _respond(self, verb: str, parameters: str) -> Response:
        handler = self._handlers.get(verb)
        if handler is None:
            return {"error": f"{verb!r} is not one of {', '.join(sorted(self._handlers))}"}
        try:
            return handler(**json.loads(parameters or "{}"))
        except (TypeError, ValueError):
            return {"error": f"{verb!r} has no such parameters: {parameters}"}

    def _send(self, client: _socket.socket, text: str) -> bool:
        """Send ``text``; return ``False`` if the client does not read it."""
        remaining = memoryview(text.encode())
        while remaining:
            if not self._backend.wait_writable(client, CLIENT_TIMEOUT):
                return False
            remaining = remaining[client.send(remaining) :]
        return True

    def _read_request(self, client: _socket.socket) -> str:
        """Return the first line of the request; empty after ``CLIENT_TIMEOUT`` seconds."""
        data, deadline = b"", self._backend.now() + CLIENT_TIMEOUT
        while b"\n" not in data and len(data) < MAX_REQUEST_BYTES:
            if not self._backend.wait_readable(client, max(0.0, deadline - self._backend.now())):
                return ""
            received = client.recv(MAX_REQUEST_BYTES)
            if not received:
                break
            data += received
        return data.partition(b"\n")[0].decode("ascii", "replace").strip()


def join_items(items: Iterable[str]) -> Iterator[str]:
    """Yield the items of a JSON list or object, with the separators between them."""
    separator = ""
    for item in items:
        yield separator + item
        separator = ", "


def _may_ask(client: _socket.socket) -> bool:
    """Return whether the client's process belongs to this user or to root.

    The modes of the socket and of its directory already exclude other users.
    This check is for volumes that do not support modes.
    """
    if not hasattr(_socket, "SO_PEERCRED"):
        return True
    credentials = client.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1] in (_ROOT, os.geteuid())


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
