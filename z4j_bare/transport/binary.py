"""A binary message as the bytes of a WebSocket frame (RFC 6455, 5.2 and 5.3), masked piece by piece.

``websocket-client`` masks a message as one number, with eight copies of it on the way, whose memory the C library keeps, or
fetches anew each time: 115 to 260 us for 60 KB, 420 for 126 KB. In pieces that is 85 and 170.
"""

from __future__ import annotations

import os
import struct

#: Bytes that are masked at a time.
PIECE = 4096

#: The first byte of a frame that is a whole binary message; of the second the bit that says "masked", and the two values
#: that stand for a length in the 2 or 8 bytes after it.
_BINARY = 0x82
_MASKED = 0x80
_IN_TWO, _IN_EIGHT = 126, 127


class BinaryFrame:
    """A whole binary message; ``WebSocket.send_frame`` takes it in place of the library's own ``ABNF``."""

    __slots__ = ("_data", "get_mask_key")

    def __init__(self, data: bytes) -> None:
        self._data = data
        #: Returns so many bytes that nobody can foresee.
        self.get_mask_key = os.urandom

    def format(self) -> bytes:
        """Return the frame."""
        key = self.get_mask_key(4)
        return b"".join((_head(len(self._data)), key, *masked(key, self._data)))


def masked(key: bytes, data: bytes) -> list[bytes]:
    """Return ``data`` in pieces, each byte combined with the one of the four of ``key`` whose turn it is."""
    width = min(PIECE, 4 * (len(data) // 4 + 1))
    stencil = int.from_bytes(key * (width // 4), "little")
    pieces = (data[start : start + width] for start in range(0, len(data), width))
    # Behind a piece that is shorter than the stencil come the stencil's own bytes.
    return [
        (int.from_bytes(piece, "little") ^ stencil).to_bytes(width, "little")[: len(piece)]
        for piece in pieces
    ]


def _head(size: int) -> bytes:
    if size < _IN_TWO:
        return struct.pack("!BB", _BINARY, _MASKED | size)
    if size < 1 << 16:
        return struct.pack("!BBH", _BINARY, _MASKED | _IN_TWO, size)
    return struct.pack("!BBQ", _BINARY, _MASKED | _IN_EIGHT, size)
