"""One signed session: what comes after ``hello_ack``, in both directions, without a socket or a clock.

Outgoing frames are spliced: the payload's canonical bytes are made once, at capture, and only the few envelope keys around
them are new at each send. A property test holds the result equal to z4j_core's own signer.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from secrets import token_urlsafe
from typing import Any

from pydantic import ValidationError
from z4j_core.errors import SignatureError, Z4JError
from z4j_core.transport.frames import HelloAckFrame, HelloAckPayload
from z4j_core.transport.framing import FrameVerifier
from z4j_core.version import PROTOCOL_VERSION

from z4j_bare.errors import IncompatibleError, RemoteProtocolError
from z4j_bare.wire import patient
from z4j_bare.wire.canonical import canonical_plain

#: Everything an id or a type may consist of without needing JSON escapes; others are escaped.
_BARE = re.compile(r"[A-Za-z0-9_.:\-]*").fullmatch

#: The frames that make a loop of ours do something.
_ACTED_UPON = frozenset({"command", "event_batch_ack", "error"})

#: Envelope bytes around a payload, generously: ids, nonce, ts, seq and a 64-character signature.
ENVELOPE_BYTES = 512

#: Bytes of a message up to which it is verified in one piece: 1 to 3 ms, 10 for the strangest.
LARGE = 32 * 1024


@dataclass(frozen=True, slots=True)
class HelloAck:
    """What ``hello_ack`` told us. ``server_time`` is the brain's clock, seconds since the epoch, if it gave one."""

    agent_id: str
    project_id: str
    session_id: str
    brain_version: str = ""
    heartbeat_seconds: float = 10.0
    max_frame_bytes: int = 1_048_576
    server_time: float | None = None


def parse_hello_ack(message: bytes) -> HelloAck:
    """Parse the brain's first message.

    Raises ``IncompatibleError`` for another protocol version and ``RemoteProtocolError`` for anything that is no
    ``hello_ack``.
    """
    try:
        frame = HelloAckFrame.model_validate_json(message)
    except (ValidationError, ValueError) as error:
        raise RemoteProtocolError(
            f"the brain's first message is no hello_ack ({type(error).__name__})"
        ) from None
    payload: HelloAckPayload = frame.payload
    if payload.protocol_version != PROTOCOL_VERSION:
        raise IncompatibleError(
            f"the brain speaks protocol {payload.protocol_version!r}, this agent {PROTOCOL_VERSION!r}: upgrade one of them"
        )
    return HelloAck(
        agent_id=payload.agent_id,
        project_id=payload.project_id,
        session_id=payload.session_id,
        brain_version=payload.brain_version,
        heartbeat_seconds=float(payload.heartbeat_interval_seconds),
        max_frame_bytes=payload.max_frame_size_bytes,
        server_time=None if frame.ts is None else frame.ts.timestamp(),
    )


class Session:
    """Signs what goes out and verifies what comes in. ``sign`` must be called under the transport's send lock.

    :param secret: the project's key, at least 32 raw bytes.
    """

    def __init__(self, hello_ack: HelloAck, secret: bytes) -> None:
        self.hello_ack = hello_ack
        self._key = hmac.new(secret, digestmod=hashlib.sha256)
        self._seq = 0
        self._agent = _quote(hello_ack.agent_id)
        self._project = _quote(hello_ack.project_id)
        self._session = _quote(hello_ack.session_id)
        self._verifier = FrameVerifier(
            secret=secret,
            agent_id=hello_ack.agent_id,
            project_id=hello_ack.project_id,
            session_id=hello_ack.session_id,
            direction="brain->agent",
        )

    def sign(self, kind: str, identity: str, payload: bytes, wall: float) -> bytes:
        """Return the wire bytes of a frame.

        :param kind: the frame type, such as ``event_batch``.
        :param identity: the frame id; an answer carries the command's.
        :param payload: canonical JSON.
        :param wall: now, in seconds since the epoch. The brain allows 60 s of skew, so a frame is signed when it is sent.
        """
        self._seq += 1
        nonce = token_urlsafe(16).encode()
        middle = b'"id":%b,"nonce":"%b","payload":%b,' % (_quote(identity), nonce, payload)
        seq = b'"seq":%d,' % self._seq
        tail = b'"ts":"%b","type":%b,"v":2}' % (_stamp(wall), _quote(kind))
        # The two ids and the session stand in the signed text only; keys are in code point order.
        digest = self._key.copy()
        digest.update(b'{"agent_id":%b,%b"project_id":%b,' % (self._agent, middle, self._project))
        digest.update(b'%b"session_id":%b,%b' % (seq, self._session, tail))
        return b'{"hmac":"%b",%b%b%b' % (digest.hexdigest().encode(), middle, seq, tail)

    def open(self, message: bytes, checkpoint: Callable[[], object] | None = None) -> Any:
        """Verify an incoming frame and return z4j_core's model of it; what is acted upon has all its fields.

        ``checkpoint`` is called every few microseconds while a large one is dealt with, and may let others run. Raises
        ``RemoteProtocolError`` and nothing else, whatever the bytes are.
        """
        try:
            if checkpoint is not None and len(message) > LARGE:
                return self._open_large(message, checkpoint)
            return _complete(self._verifier.parse_and_verify(message))
        except SignatureError as error:
            raise RemoteProtocolError(
                f"the brain's frame failed verification: {error}", code=4403
            ) from None
        except (
            Z4JError,
            ValidationError,
            ValueError,
            TypeError,
            RecursionError,
            AttributeError,
            KeyError,
        ) as error:
            raise RemoteProtocolError(
                f"the brain's frame is malformed ({type(error).__name__})"
            ) from None

    def _open_large(self, message: bytes, checkpoint: Callable[[], object]) -> Any:
        """Check the signature in bites; then have z4j_core judge the frame without its bulk, which we sign for that."""
        frame = patient.loads(message, checkpoint)
        signature, payload = frame["hmac"], frame["payload"]  # what has none is not worth a digest
        if not hmac.compare_digest(self._digest(frame, checkpoint), signature):
            raise SignatureError("the signature of a large frame does not match")
        bulk = {name: value for name, value in payload.items() if isinstance(value, dict)}
        light = {
            **frame,
            "payload": {name: value for name, value in payload.items() if name not in bulk},
        }
        light["hmac"] = self._digest(light, checkpoint)
        opened = _complete(self._verifier.parse_and_verify(canonical_plain(light)))
        for name in bulk.keys() & type(opened.payload).model_fields.keys():
            setattr(opened.payload, name, bulk[name])
        return opened

    def _digest(self, frame: dict[str, Any], checkpoint: Callable[[], object]) -> str:
        hello_ack, digest = self.hello_ack, self._key.copy()
        ids = {
            "agent_id": hello_ack.agent_id,
            "project_id": hello_ack.project_id,
            "session_id": hello_ack.session_id,
        }
        envelope = {name: value for name, value in {**frame, **ids}.items() if name != "hmac"}
        for piece in patient.canonical_pieces(envelope, checkpoint):
            digest.update(piece)
        return digest.hexdigest()


def _complete(frame: Any) -> Any:
    """Return the frame validated: z4j_core checks the signature only, and a field that is missing would end a loop."""
    if frame.type not in _ACTED_UPON:
        return frame
    return type(frame).model_validate({**vars(frame), "payload": vars(frame.payload)})


def _quote(text: str) -> bytes:
    return b'"%b"' % text.encode() if _BARE(text) else json.dumps(text, ensure_ascii=False).encode()


def _stamp(wall: float) -> bytes:
    return datetime.fromtimestamp(wall, UTC).isoformat().encode()
