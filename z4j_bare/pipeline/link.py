"""A live session: transport and signature together, which is all that a loop needs to send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from z4j_bare.concurrency.timeslice import TimeSlice
from z4j_bare.errors import FrameTooLargeError
from z4j_bare.interfaces import IConnection

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.wire.session import Session

#: Seconds by which two clocks that somebody looks after part in a second, generously.
DRIFT = 1e-4


@implementer(IConnection)
class Connection:
    """Sends signed frames from any loop; the transport's lock keeps seq order and wire order the same.

    :param transport: an ``ITransport`` that is connected.
    """

    def __init__(self, transport: Any, session: Session, backend: BaseConcurrency) -> None:
        self.transport = transport
        self.session = session
        self.hello_ack = session.hello_ack
        #: Seconds by which the brain's clock was ahead of ours when it welcomed us, if it told.
        self.behind = (
            None
            if self.hello_ack.server_time is None
            else self.hello_ack.server_time - backend.wall()
        )
        self.closing = backend.event()
        self.wake = backend.event()
        self._backend = backend
        self._timeslice = TimeSlice(backend)
        self._fastest = float("inf")
        self._heard_at = backend.now()
        if self.hello_ack.server_time is not None:
            self.lateness(self.hello_ack.server_time)

    def send(self, kind: str, identity: str, payload: bytes) -> int:
        """Sign and send one frame; return its size in bytes. Raises ``NetworkError``."""
        size: int = self.transport.send(
            lambda: self.session.sign(kind, identity, payload, self._backend.wall())
        )
        return size

    def open(self, message: bytes) -> Any:
        """Verify a message of the brain and return z4j_core's model of it. Raises ``RemoteProtocolError``."""
        # fifty commands may have come in one piece, with no wait in between
        self._timeslice.checkpoint()
        return self.session.verify(message, self._timeslice.checkpoint)

    def rested(self) -> None:
        """Note that whoever opens messages has waited for the next one; a yield right after that is for nobody."""
        self._timeslice.restart()

    def lateness(self, stamp: float) -> float:
        """Return how many seconds longer than the fastest frame of this session one took that the brain stamped ``stamp``.

        Clocks may differ, so only frames can be compared with each other; what is late has waited for a worker that was
        stopped or a hub that was blocked. The comparison forgets 0.1 ms a second, for clocks drift.
        """
        now = self._backend.now()
        took = now - stamp
        self._fastest = min(took, self._fastest + (now - self._heard_at) * DRIFT)
        self._heard_at = now
        return took - self._fastest

    def send_shrinking(
        self, kind: str, identity: str, payload: bytes, shrink: Callable[[bytes], Iterator[bytes]]
    ) -> bool:
        """Send the payload, or the first of its lighter versions that fits; return whether something was cut.

        Raises ``FrameTooLargeError`` when none does.
        """
        try:
            self.send(kind, identity, payload)
            return False
        except FrameTooLargeError as error:
            unfit = error
        for version in shrink(payload):
            try:
                self.send(kind, identity, version)
                return True
            except FrameTooLargeError as error:
                unfit = error
        raise unfit

    def shut(self) -> None:
        """End the session: its loops leave at their next wake, and the reader wakes now."""
        self.closing.set()
        self.wake.set()
        self.transport.abort()
