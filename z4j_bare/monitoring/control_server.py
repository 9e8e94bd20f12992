"""Serves ``z4j-bare status`` and ``restart`` on a Unix socket; ``control.py`` is the client."""

from __future__ import annotations

import _socket  # the C class is never patched; every wait uses the backend
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
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
MAX_REQUEST_BYTES = 64


class ControlServer:
    """Serves one client at a time. Without a client the server uses almost no CPU.

    :param adapter: the framework adapter's name, which is part of the socket's file name.
    :param handlers: maps each verb to the function that returns the response.
    """

    def __init__(
        self,
        adapter: str,
        handlers: Mapping[str, Callable[[], dict[str, Any]]],
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
            if ok and self._listener is not None:
                self._accept_loop(self._listener, stop_event)
            else:
                logger.info(
                    "z4j: `z4j-bare status` and `restart` cannot reach this agent,"
                    " because it has no control socket: %s",
                    error,
                )
                self._backend.wait(stop_event)
        finally:
            # In a forked child ``offload`` raises, so the child does not remove the parent's files.
            self._backend.offload(_unlink, self._files)

    def wake(self) -> None:
        """Send an empty request, so that the loop checks its stop event. Never waits."""
        with suppress(OSError, IndexError):
            control.ControlClient(self._adapter, 0, self._files[-1]).send("")

    def _open(self) -> None:
        self._files.append(control.write_pidfile(self._adapter))
        if not hasattr(_socket, "AF_UNIX"):
            raise OSError("this platform has no Unix sockets")
        path = control.new_socket_path(self._adapter)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        listener.setblocking(False)
        with control.socket_address(path) as address:
            listener.bind(address)
        self._files.append(path)
        path.chmod(0o600)
        listener.listen(8)
        self._listener = listener

    def _accept_loop(self, listener: _socket.socket, stop_event: IEvent) -> None:
        try:
            while not stop_event.is_set():
                if self._backend.wait_readable(listener, STOP_POLL_INTERVAL):
                    self._accept(listener)
        finally:
            listener.close()

    def _accept(self, listener: _socket.socket) -> None:
        try:
            descriptor, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
        except OSError:  # the listener is closed, or the client has disconnected
            return
        client = _socket.socket(fileno=descriptor)
        try:
            client.setblocking(False)
            self._handle(client)
        except OSError as error:
            logger.debug("z4j: control client disconnected: %s", error)
        finally:
            client.close()

    def _handle(self, client: _socket.socket) -> None:
        verb = self._read_verb(client)
        if not verb:
            return
        handler = self._handlers.get(verb)
        response = (
            handler()
            if handler
            else {"error": f"{verb!r} is not one of {', '.join(sorted(self._handlers))}"}
        )
        remaining = memoryview(json.dumps(response, default=str).encode())
        while remaining and self._backend.wait_writable(client, CLIENT_TIMEOUT):
            remaining = remaining[client.send(remaining) :]

    def _read_verb(self, client: _socket.socket) -> str:
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


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
