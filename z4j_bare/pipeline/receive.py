"""Receives frames from the brain, verifies each frame, and passes it to a handler."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from z4j_core.transport.frames import (
    CommandFrame,
    ErrorFrame,
    EventBatchAckFrame,
)

from z4j_bare.concurrency.timeslice import SLICE_SECONDS
from z4j_bare.errors import IncompatibleError, RemoteProtocolError

if TYPE_CHECKING:
    from z4j_bare.pipeline.session import Connection

logger = logging.getLogger("z4j.runtime.pipeline.receive")

#: Timeout of one read in seconds. The read must end so that the transport can ping after 30 s of
#: silence. Each end of a read costs an idle worker 0.25 ms of CPU. ``abort`` ends a read at once.
READ_TIMEOUT = 10.0

#: Codes of fatal ``error`` frames that only an upgrade of the agent or of the brain prevents.
_UPGRADE_CODES = frozenset({"agent_incompatible", "protocol_incompatible"})

#: Code of the ``error`` frame that the brain sends for every batch that contains a certain event.
#: The agent handles this frame like a close with code 4400.
#: See docs/protocol.md, Close codes and errors.
_REJECTED_EVENT = "scheduler_upgrade_required"


class ReceiveLoop:
    """Reads frames until the session ends.

    :param on_ack: called with the id of an acknowledged frame.
    :param on_command: called with a command frame, the connection, and the frame's delay in
        seconds; must not wait.
    """

    def __init__(
        self,
        connection: Connection,
        on_ack: Callable[[str], None],
        on_command: Callable[[CommandFrame, Connection, float], None],
    ) -> None:
        self._connection = connection
        self._on_ack = on_ack
        self._on_command = on_command

    def run(self) -> None:
        """Read frames until the agent ends the session.

        Raises ``NetworkError`` or ``RemoteError`` when the session ends for another reason.
        """
        while not self._connection.closing.is_set():
            self._receive_one(READ_TIMEOUT)
        # Process the frames that have arrived already.
        # They must not be dropped: they can be acks, commands that the brain regards as delivered,
        # or a close frame with the reason of a failed send.
        while self._receive_one(timeout=0):
            pass

    def _receive_one(self, timeout: float) -> bool:
        began = time.perf_counter()
        message = self._connection.transport.receive(timeout)
        if time.perf_counter() - began > SLICE_SECONDS:
            self._connection.on_receive_waited()
        if message is None:
            return False
        frame = self._connection.open(message)
        delay = self._connection.relative_delay(frame.ts.timestamp()) if frame.ts else 0.0
        if isinstance(frame, EventBatchAckFrame):
            self._connection.accept()
            self._on_ack(str(frame.payload.acked_id))
        elif isinstance(frame, CommandFrame):
            self._on_command(frame, self._connection, delay)
        elif isinstance(frame, ErrorFrame):
            _on_error_frame(frame)
        else:
            logger.debug("z4j: ignored a %s frame", frame.type)
        return True


def _on_error_frame(frame: ErrorFrame) -> None:
    code, text = str(frame.payload.code), str(frame.payload.message)[:500]
    if code == _REJECTED_EVENT:
        raise RemoteProtocolError(f"the brain rejects an event ({code}: {text})", code=4400)
    if not frame.payload.fatal:
        logger.warning("z4j: the brain reports %s: %s", code, text)
    elif code in _UPGRADE_CODES:
        raise IncompatibleError(f"the brain ended the session with {code}: {text}")
    else:
        raise RemoteProtocolError(f"the brain ended the session with {code}: {text}")
