"""Brain to agent: verify every message and hand it to whom it concerns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from z4j_bare.concurrency.timeslice import SLICE_SECONDS
from z4j_bare.errors import IncompatibleError, RemoteProtocolError

if TYPE_CHECKING:
    from z4j_bare.pipeline.link import Connection

logger = logging.getLogger("z4j.runtime.receive")

#: Seconds that the reader waits at a time. ``abort`` wakes it at once; by itself it wakes to look for silence (a ping after
#: 30 s), and each wake of an idle worker costs 0.25 ms.
READ_TIMEOUT = 10.0

#: Codes of a fatal ``error`` frame that an upgrade alone cures.
_UPGRADE = frozenset({"agent_incompatible", "protocol_incompatible"})

#: The code that one event brings about, in batch after batch (``brain-contract`` 2.4): as good as a close with 4400.
_REFUSED_EVENT = "scheduler_upgrade_required"


class ReceiveLoop:
    """Reads until the session ends.

    :param acked: called with the id of an acknowledged frame.
    :param command: called with a command frame, the link, and how many seconds late it was read; must not wait.
    """

    def __init__(
        self,
        link: Connection,
        acked: Callable[[str], None],
        command: Callable[[Any, Connection, float], None],
    ) -> None:
        self._link = link
        self._routes: dict[str, Callable[[Any, float], None]] = {
            "event_batch_ack": lambda frame, _: acked(str(frame.payload.acked_id)),
            "command": lambda frame, late: command(frame, link, late),
            "error": _complain,
        }

    def run(self) -> None:
        """Read until we end the session ourselves; raise ``NetworkError`` or ``RemoteError`` when it ends otherwise."""
        while not self._link.closing.is_set():
            self._take(READ_TIMEOUT)
        # What has arrived counts: acks, commands that for the brain are on their way, and the close code that says why the
        # line broke under a sender.
        while self._take(0.0):
            pass

    def _take(self, timeout: float) -> bool:
        began = time.perf_counter()
        message = self._link.transport.receive(timeout)
        if time.perf_counter() - began > SLICE_SECONDS:
            self._link.rested()
        if message is None:
            return False
        frame = self._link.open(message)
        late = self._link.lateness(frame.ts.timestamp()) if frame.ts else 0.0
        self._routes.get(frame.type, _ignore)(frame, late)
        return True


def _complain(frame: Any, _late: float) -> None:
    code, text = str(frame.payload.code), str(frame.payload.message)[:500]
    if code == _REFUSED_EVENT:
        raise RemoteProtocolError(f"the brain does not take an event ({code}: {text})", code=4400)
    if not frame.payload.fatal:
        logger.warning("z4j: the brain reports %s: %s", code, text)
    elif code in _UPGRADE:
        raise IncompatibleError(f"the brain ended the session with {code}: {text}")
    else:
        raise RemoteProtocolError(f"the brain ended the session with {code}: {text}")


def _ignore(frame: Any, _late: float) -> None:
    logger.debug("z4j: ignored a %s frame", frame.type)
