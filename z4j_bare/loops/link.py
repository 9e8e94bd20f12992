"""A live session: transport and signature together, which is all that a loop needs to send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from z4j_bare.errors import FrameTooLargeError

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency
    from z4j_bare.wire.session import Session


class Link:
    """Sends signed frames from any loop; the transport's lock keeps seq order and wire order the same.

    :param transport: an ``ITransport`` that is connected.
    """

    def __init__(self, transport: Any, session: Session, seam: BaseConcurrency) -> None:
        self.transport = transport
        self.session = session
        self.welcome = session.welcome
        self.closing = seam.event()
        self.wake = seam.event()
        self._seam = seam

    def send(self, kind: str, identity: str, payload: bytes) -> int:
        """Sign and send one frame; return its size in bytes. Raises ``NetworkError``."""
        size: int = self.transport.send(lambda: self.session.sign(kind, identity, payload, self._seam.wall()))
        return size

    def send_some(self, kind: str, identity: str, payload: bytes, lighter: Callable[[bytes], Iterator[bytes]]) -> bool:
        """Send the payload, or the first of its lighter versions that fits; return whether something was cut.

        Raises ``FrameTooLargeError`` when none does.
        """
        try:
            self.send(kind, identity, payload)
            return False
        except FrameTooLargeError as error:
            unfit = error
        for version in lighter(payload):
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
