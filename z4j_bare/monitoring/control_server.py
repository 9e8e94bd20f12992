"""The agent's desk: a Unix socket in ``Z4J_HOME`` at which ``z4j-bare status`` and ``restart`` ask (``control.py``)."""

from __future__ import annotations

import _socket  # the C class, which nobody patches: its waits go through the backend
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from z4j_bare import control

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

logger = logging.getLogger("z4j.runtime.control")

#: Seconds for a visitor to say a word and to take the answer, and between two looks at whether the desk shall close.
PATIENCE = 2.0
LOOK = 60.0

#: Bytes of a word.
LONGEST_WORD = 64


class Desk:
    """Serves one visitor at a time; nobody wakes while there is none.

    :param adapter: the framework adapter's name, under which the agent is found.
    :param answers: what to do at a word; returns the answer.
    """

    def __init__(
        self,
        adapter: str,
        answers: Mapping[str, Callable[[], dict[str, Any]]],
        backend: BaseConcurrency,
    ) -> None:
        self._adapter = adapter
        self._answers = answers
        self._backend = backend
        self._listener: Any = None
        self._files: list[Path] = []

    def run(self, stop_event: Any) -> None:
        """Serve until ``stop_event`` is set, and :meth:`wake` called."""
        ok, error = self._backend.offload(self._open)
        try:
            if ok:
                self._attend(stop_event)
            else:
                logger.info(
                    "z4j: `z4j-bare status` and `restart` will not find this agent: %s", error
                )
                self._backend.wait(stop_event)
        finally:
            self._backend.offload(
                _unlink, self._files
            )  # raises in a forked child, before it touches our files

    def wake(self) -> None:
        """Let the loop look at ``stop_event``; waits for nothing."""
        with suppress(OSError, IndexError):
            control.ControlClient(self._adapter, 0, self._files[-1]).send("")

    def _attend(self, stop_event: Any) -> None:
        try:
            while not stop_event.is_set():
                if self._backend.wait_readable(self._listener, LOOK):
                    self._meet()
        finally:
            self._listener.close()

    def _open(self) -> None:
        self._files.append(control.write_pidfile(self._adapter))
        if not hasattr(_socket, "AF_UNIX"):
            raise OSError("this platform has no Unix sockets")
        path = control.new_socket_path(self._adapter)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        listener.setblocking(False)
        with control.socket_address(path) as short:
            listener.bind(short)
        self._files.append(path)
        path.chmod(0o600)
        listener.listen(8)
        self._listener = listener

    def _meet(self) -> None:
        try:
            descriptor, _ = self._listener._accept()  # noqa: SLF001 - the C class has no other
        except OSError:  # closed, or the visitor has gone
            return
        visitor = _socket.socket(fileno=descriptor)
        try:
            visitor.setblocking(False)
            self._serve(visitor)
        except OSError as error:
            logger.debug("z4j: a visitor at the desk left: %s", error)
        finally:
            visitor.close()

    def _serve(self, visitor: Any) -> None:
        word = self._read(visitor)
        if not word:
            return
        answer = self._answers.get(word)
        said = (
            answer()
            if answer
            else {"error": f"{word!r} is none of {', '.join(sorted(self._answers))}"}
        )
        left = memoryview(json.dumps(said, default=str).encode())
        while left and self._backend.wait_writable(visitor, PATIENCE):
            left = left[visitor.send(left) :]

    def _read(self, visitor: Any) -> str:
        """Return the word before the line's end, or nothing when there is none in time."""
        said, deadline = b"", self._backend.now() + PATIENCE
        while b"\n" not in said and len(said) < LONGEST_WORD:
            if not self._backend.wait_readable(visitor, max(0.0, deadline - self._backend.now())):
                return ""
            part = visitor.recv(LONGEST_WORD)
            if not part:
                break
            said += part
        return said.partition(b"\n")[0].decode("ascii", "replace").strip()


def _unlink(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
