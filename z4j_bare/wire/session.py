"""Signs and verifies the frames of a session, without a socket or a clock.

An outgoing payload is encoded once, even if it is sent several times. Signing only adds an envelope
to the encoded payload. A property test compares the result with z4j_core's own signer.
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
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from z4j_core.errors import SignatureError, Z4JError
from z4j_core.transport.frames import HelloAckFrame, HelloAckPayload
from z4j_core.transport.framing import FrameVerifier
from z4j_core.version import PROTOCOL_VERSION

from z4j_bare.errors import IncompatibleError, RemoteProtocolError
from z4j_bare.wire.canonical import iter_canonical, loads_incrementally

if TYPE_CHECKING:
    from z4j_core.transport.frames import Frame

#: Matches an id or a type that needs no JSON escapes.
_NO_ESCAPES_NEEDED = re.compile(r"[A-Za-z0-9_.:\-]*").fullmatch

#: Types of incoming frames that the agent processes. The agent ignores frames of other types.
_PROCESSED_TYPES = frozenset({"command", "event_batch_ack", "error"})

#: Maximum bytes of the envelope around a payload: id, type, nonce, timestamp, seq and signature.
ENVELOPE_BYTES = 512

#: Messages larger than this many bytes are verified in small steps.
#: The verification of a smaller message takes 1 to 3 ms, and at worst 10 ms.
INCREMENTAL_THRESHOLD = 32 * 1024


@dataclass(frozen=True, slots=True)
class HelloAck:
    """The content of ``hello_ack``.

    ``server_time`` is the brain's time in seconds since the epoch, if it was sent.
    """

    agent_id: str
    project_id: str
    session_id: str
    brain_version: str = ""
    heartbeat_seconds: float = 10.0
    max_frame_bytes: int = 1_048_576
    server_time: float | None = None


def parse_hello_ack(message: bytes) -> HelloAck:
    """Parse the brain's first message.

    Raises ``IncompatibleError`` for another protocol version, and ``RemoteProtocolError`` for any
    message that is not a ``hello_ack``.
    """
    try:
        frame = HelloAckFrame.model_validate_json(message)
    except (ValidationError, ValueError) as error:
        raise RemoteProtocolError(
            f"the brain's first message is not a hello_ack ({type(error).__name__})"
        ) from None
    payload: HelloAckPayload = frame.payload
    if payload.protocol_version != PROTOCOL_VERSION:
        raise IncompatibleError(
            f"the brain uses protocol version {payload.protocol_version!r} and this agent "
            f"{PROTOCOL_VERSION!r}: upgrade one of them"
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
    """Signs outgoing frames and verifies incoming frames.

    The brain rejects frames whose sequence numbers are out of order. Therefore the transport's send
    lock must be held from the call of ``sign`` until the frame is written.

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
        :param identity: the frame id. A ``command_ack`` or ``command_result`` has the id of its
            command.
        :param payload: canonical JSON.
        :param wall: the current time in seconds since the epoch. The brain rejects a time that
            differs from its clock by more than 60 s.
        """
        self._seq += 1
        nonce = token_urlsafe(16).encode()
        envelope = b'"id":%b,"nonce":"%b","payload":%b,' % (_quote(identity), nonce, payload)
        seq = b'"seq":%d,' % self._seq
        tail = b'"ts":"%b","type":%b,"v":2}' % (_timestamp(wall), _quote(kind))
        # The signed text also contains the ids of agent, project and session.
        # The keys are sorted by code points.
        digest = self._key.copy()
        digest.update(b'{"agent_id":%b,%b"project_id":%b,' % (self._agent, envelope, self._project))
        digest.update(b'%b"session_id":%b,%b' % (seq, self._session, tail))
        return b'{"hmac":"%b",%b%b%b' % (digest.hexdigest().encode(), envelope, seq, tail)

    def verify(self, message: bytes, checkpoint: Callable[[], object] | None = None) -> Frame:
        """Verify an incoming frame and return z4j_core's model of the frame.

        The fields of a frame that the agent processes are validated as well. Raises
        only ``RemoteProtocolError``.

        :param checkpoint: called every few microseconds during the verification of a large message,
            and may yield.
        """
        try:
            if checkpoint is not None and len(message) > INCREMENTAL_THRESHOLD:
                return self._verify_incrementally(message, checkpoint)
            return _validated(self._verifier.parse_and_verify(message))
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

    def _verify_incrementally(self, message: bytes, checkpoint: Callable[[], object]) -> Frame:
        """Verify the signature in small steps, and let z4j_core verify a small copy of the frame.

        The copy omits the payload's JSON objects, which make up most of the frame. The copy is
        signed again, so that z4j_core can check all other fields. Then the objects are added to
        z4j_core's model.
        """
        frame = loads_incrementally(message, checkpoint)
        # Read both values before the digest is computed, so that a missing key raises ``KeyError``
        # early.
        signature, payload = frame["hmac"], frame["payload"]
        if not hmac.compare_digest(self._digest(frame, checkpoint), signature):
            raise SignatureError("the signature of a large frame does not match")
        objects = {name: value for name, value in payload.items() if isinstance(value, dict)}
        rest = {name: value for name, value in payload.items() if name not in objects}
        small = {**frame, "payload": rest}
        small["hmac"] = self._digest(small, checkpoint)
        encoded = b"".join(iter_canonical(small, checkpoint))
        verified = _validated(self._verifier.parse_and_verify(encoded))
        for name in objects.keys() & type(verified.payload).model_fields.keys():
            setattr(verified.payload, name, objects[name])
        return verified

    def _digest(self, frame: dict[str, Any], checkpoint: Callable[[], object]) -> str:
        hello_ack, digest = self.hello_ack, self._key.copy()
        ids = {
            "agent_id": hello_ack.agent_id,
            "project_id": hello_ack.project_id,
            "session_id": hello_ack.session_id,
        }
        envelope = {name: value for name, value in {**frame, **ids}.items() if name != "hmac"}
        for piece in iter_canonical(envelope, checkpoint):
            digest.update(piece)
        return digest.hexdigest()


def _validated(frame: Frame) -> Frame:
    """Validate the fields of a frame that the agent processes.

    z4j_core checks only the signature. A missing field would raise ``AttributeError`` later, in a
    loop of the agent.
    """
    if frame.type not in _PROCESSED_TYPES:
        return frame
    return type(frame).model_validate({**vars(frame), "payload": vars(frame.payload)})


def _quote(text: str) -> bytes:
    if _NO_ESCAPES_NEEDED(text):
        return b'"%b"' % text.encode()
    return json.dumps(text, ensure_ascii=False).encode()


def _timestamp(wall: float) -> bytes:
    return datetime.fromtimestamp(wall, UTC).isoformat().encode()
