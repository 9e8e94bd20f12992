"""The signed session against z4j_core, which the brain itself verifies with."""

import base64
import json
import time
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from z4j_core.models import Event, EventKind
from z4j_core.transport.frames import (
    CommandFrame,
    CommandPayload,
    EventBatchFrame,
    EventBatchPayload,
    parse_frame,
)
from z4j_core.transport.framing import FrameSigner, FrameVerifier
from z4j_core.transport.hmac import sign_envelope

from z4j_bare.errors import IncompatibleError, RemoteProtocolError
from z4j_bare.wire import canonical as incremental
from z4j_bare.wire import frames, session
from z4j_bare.wire.canonical import canonical, canonical_plain, to_json_types
from z4j_bare.wire.fit import fit_id

SECRET = base64.urlsafe_b64decode("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")
HELLO_ACK = session.HelloAck(
    "11111111-1111-4111-8111-111111111111",
    "22222222-2222-4222-8222-222222222222",
    "33333333-3333-4333-8333-333333333333",
)
BINDING = {
    "agent_id": HELLO_ACK.agent_id,
    "project_id": HELLO_ACK.project_id,
    "session_id": HELLO_ACK.session_id,
}

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([1e16, 0.1 + 0.2, -0.0, 5e-324, 1e308, 10**400])
    | st.text(st.characters(), max_size=40)
    | st.sampled_from(["\ud800", "é\u2028", "\x00", '"\\'])
    | st.binary(max_size=8)
    | st.dates()
    | st.sets(st.integers(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text(st.characters(), max_size=6)
            | st.integers()
            | st.none()
            | st.booleans()
            | st.floats(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def verifier():
    return FrameVerifier(secret=SECRET, **BINDING)


def an_event(data, task_id="t-1", queue="celery"):
    return Event.model_construct(
        id=UUID(int=4),
        engine="celery",
        task_id=task_id,
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=session.datetime.now(session.UTC),
        data={"queue": queue, **data},
    )


def test_sign_reproduces_published_vector(monkeypatch):
    """The test vector of docs/protocol.md results byte for byte."""
    monkeypatch.setattr(session, "token_urlsafe", lambda _n: "A" * 22)
    payload = canonical(
        {
            "events": [
                {
                    "data": {"n": None, "r": 1.0, "s": "é\u2028"},
                    "engine": "celery",
                    "kind": "task.succeeded",
                    "task_id": "t1",
                }
            ]
        }
    )
    wire = session.Session(HELLO_ACK, SECRET).sign("event_batch", "b-1", payload, 1767323045.678901)
    assert json.loads(wire)["ts"] == "2026-01-02T03:04:05.678901+00:00"
    assert (
        json.loads(wire)["hmac"]
        == "2b8213f57f0361ab9f0f4733fbcf2bf5bbbb59d328870cac13549538765f3b67"
    )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), anything, max_size=4), max_size=4),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
)
def test_core_verifies_any_signed_event_batch(datas, task_id):
    """z4j_core's verifier accepts the frames of any events."""
    signer, core = session.Session(HELLO_ACK, SECRET), verifier()
    for data in datas:
        encoded = frames.encode_event(an_event(data, task_id))
        frame = core.parse_and_verify(
            signer.sign("event_batch", "ev_1", frames.event_batch([encoded]), time.time())
        )
        assert frame.payload.events[0]["task_id"] == fit_id(task_id, "celery")


@settings(max_examples=200, deadline=None)
@given(anything)
def test_spliced_signature_equals_core_signature(value):
    """The signature equals z4j_core's signature of the parsed frame with the three ids."""
    wire = json.loads(
        session.Session(HELLO_ACK, SECRET).sign(
            "heartbeat", 'h"é', canonical({"x": value}), time.time()
        )
    )
    given_hmac = wire.pop("hmac")
    assert given_hmac == sign_envelope(SECRET, {**wire, **BINDING})


@settings(max_examples=200, deadline=None)
@given(anything)
def test_canonical_bytes_survive_round_trip(value):
    """A sanitised value encodes to the same bytes after a parse, as in the brain."""
    encoded = canonical(value)
    assert canonical_plain(json.loads(encoded)) == encoded
    assert to_json_types(json.loads(encoded)) == json.loads(encoded)


def test_keys_with_equal_text_collapse():
    """Keys with equal text leave one entry, because duplicates would break the signature (4403)."""
    assert canonical({1: "a", "1": "b"}) == b'{"1":"b"}'


def test_event_with_large_strings_is_truncated():
    """An event with strings of 1 MiB is truncated, keeps its names and is marked."""
    encoded = frames.encode_event(
        an_event({"task_name": "shop.pay", "args": ["é" * 1_048_576], "traceback": "x" * 1_048_576})
    )
    fields = json.loads(encoded)
    assert len(encoded) <= frames.MAX_EVENT_BYTES
    assert fields["data"]["task_name"] == "shop.pay"
    assert fields["data"]["queue"] == "celery"
    assert "bytes cut" in fields["data"]["traceback"]


def test_shrink_event_keeps_names_last():
    """An event whose size is in unknown fields keeps only its names and the cut size."""
    fields = json.loads(
        frames.shrink_event(
            {"id": "x", "data": {"task_name": "a", "queue": "q" * 300, "odd": ["y" * 5000]}}, 2000
        )
    )
    assert fields["data"]["task_name"] == "a"
    assert len(fields["data"]["queue"]) == 200
    assert "bytes cut" in fields["data"]["cut"]


def test_object_with_failing_str_is_named_by_class():
    """An object whose ``__str__`` raises is replaced by its class name."""

    class FailingStr:
        def __str__(self):
            raise ValueError

    assert canonical({"x": FailingStr()}).startswith(b'{"x":"<tests.unit.wire.test_session')


def test_deep_nesting_becomes_marker():
    """A value nested a thousand levels deep is cut with a marker and causes no recursion error."""
    value = []
    for _ in range(900):
        value = [value]
    assert b"nested too deep" in canonical(value)


def test_sequence_counts_from_one():
    """Each session numbers its frames from 1 without a gap."""
    signer = session.Session(HELLO_ACK, SECRET)
    numbers = [
        json.loads(signer.sign("heartbeat", "h", b"{}", time.time()))["seq"] for _ in range(3)
    ]
    assert numbers == [1, 2, 3]


def signed_by_brain(**payload):
    frame = EventBatchFrame(id="eba_1", payload=EventBatchPayload(events=[payload]))
    return FrameSigner(secret=SECRET, **BINDING).sign_and_serialize(frame)


def test_verify_accepts_frame_once():
    """A frame that z4j_core signed for this session is accepted once and rejected as a replay."""
    signer, message = session.Session(HELLO_ACK, SECRET), signed_by_brain(x=1)
    assert signer.verify(message).payload.events == [{"x": 1}]
    with pytest.raises(RemoteProtocolError, match="verification"):
        signer.verify(message)


def verify_outcome(signer, message):
    """Verify a message; return its payload or the class of the error."""
    try:
        return signer.verify(message, lambda: None).payload.model_dump()
    except RemoteProtocolError:
        return RemoteProtocolError


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), anything, max_size=4).map(
        lambda value: json.loads(canonical(value))
    ),
    st.sampled_from(["", "key", "alter", "again"]),
)
def test_incremental_verification_equals_core_verification(parameters, attack):
    """Incremental verification agrees with z4j_core's verifier on valid and forged frames."""
    signer = FrameSigner(secret=bytes(32) if attack == "key" else SECRET, **BINDING)
    payload = CommandPayload(
        action="submit_task", parameters={"kept": 1, **parameters}, timeout_seconds=7
    )
    message = signer.sign_and_serialize(CommandFrame(id="c-1", payload=payload))
    if attack == "alter":
        message = message.replace(b'"kept":1', b'"kept":2')
    whole, large = session.Session(HELLO_ACK, SECRET), session.Session(HELLO_ACK, SECRET)
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2 if attack == "again" else 1):
            expected = verify_outcome(whole, message)
            patch.setattr(session, "INCREMENTAL_THRESHOLD", 0)
            assert verify_outcome(large, message) == expected
            patch.undo()
    assert (expected is RemoteProtocolError) == bool(attack)


@settings(max_examples=300, deadline=None)
@given(anything)
def test_incremental_json_equals_stdlib(value):
    """Incremental parsing and encoding have the same results as the standard library."""
    text, calls = canonical(value), []
    assert incremental.loads_incrementally(text, lambda: calls.append(1)) == json.loads(text)
    assert b"".join(incremental.iter_canonical(json.loads(text), lambda: calls.append(1))) == text


def test_iter_canonical_splits_long_strings():
    """A long string is encoded in pieces, without splitting escapes or wide characters."""
    value = {
        "a": ('"\\\n\x00é\u2028\U0001f600' * incremental.CHUNK_CHARS)[:-3],
        "b": ["x" * incremental.CHUNK_CHARS * 2],
    }
    pieces = list(incremental.iter_canonical(value, lambda: None))
    assert b"".join(pieces).decode() == incremental.sanitised_text(value)
    assert max(map(len, pieces)) < 10 * incremental.CHUNK_CHARS


def test_verify_rejects_foreign_signature():
    """A frame signed with another key raises ``RemoteProtocolError``."""
    signer = session.Session(HELLO_ACK, bytes(32))
    with pytest.raises(RemoteProtocolError):
        signer.verify(signed_by_brain(x=1))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | anything.map(canonical)
    | st.sampled_from(
        [
            b"{}",
            b"[]",
            b'{"v":2,"type":"command"}',
            b'{"v":2,"type":"hello","payload":3}',
            b"[" * 100_000,
            b'{"v":' + b"9" * 5000 + b"}",
        ]
    )
)
def test_verify_raises_only_protocol_error_for_any_bytes(message):
    """Verification raises ``RemoteProtocolError`` and nothing else, for any bytes."""
    for large in (session.INCREMENTAL_THRESHOLD, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "INCREMENTAL_THRESHOLD", large)
            assert (
                verify_outcome(session.Session(HELLO_ACK, SECRET), message) is RemoteProtocolError
            )


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | anything.map(canonical))
def test_parse_hello_ack_raises_only_protocol_error_for_any_bytes(message):
    """Parsing the first message raises ``RemoteProtocolError`` and nothing else, for any bytes."""
    with pytest.raises(RemoteProtocolError):
        session.parse_hello_ack(message)


def hello_ack_message(**payload):
    body = {
        "protocol_version": "2",
        "brain_version": "1.13.0",
        "agent_id": "a",
        "project_id": "p",
        "session_id": "s",
        **payload,
    }
    return canonical(
        {"v": 2, "type": "hello_ack", "id": "hack_1", "ts": "2026-01-02T03:04:05Z", "payload": body}
    )


def test_parse_hello_ack_reads_ids_limits_and_clock():
    """``hello_ack`` has the ids, the heartbeat interval, the frame limit and the clock."""
    hello_ack = session.parse_hello_ack(
        hello_ack_message(heartbeat_interval_seconds=7, max_frame_size_bytes=4096)
    )
    assert (hello_ack.agent_id, hello_ack.project_id, hello_ack.session_id) == ("a", "p", "s")
    assert (hello_ack.heartbeat_seconds, hello_ack.max_frame_bytes, hello_ack.server_time) == (
        7.0,
        4096,
        1767323045.0,
    )


def test_parse_hello_ack_rejects_other_protocol_version():
    """Another protocol version raises ``IncompatibleError``."""
    with pytest.raises(IncompatibleError, match="upgrade"):
        session.parse_hello_ack(hello_ack_message(protocol_version="3"))


def test_hello_is_valid_for_core_model():
    """z4j_core's strict model accepts the ``hello`` frame."""
    identity = frames.Identity(
        framework="bare",
        agent_version="1.13.0+green.1",
        worker_id="bare-1-2",
        worker_pid=1,
        worker_started_at=session.datetime.now(session.UTC),
        agent_name="w1",
        engines=("celery",),
        capabilities={"celery": ["retry_task"]},
    )
    frame = parse_frame(frames.hello(identity))
    assert frame.payload.engines == ["celery"]
    assert frame.payload.host == {"name": "w1"}


def test_large_result_becomes_summary():
    """A result that is too large keeps its status and numbers, and reports the reason.

    Keys can be anything.
    """
    body = json.loads(
        frames.command_result(
            "success", {"rows": ["x" * 100] * 5000, "done": 5000, "all": True}, None, "tok"
        )
    )
    assert (body["status"], body["error"], body["delivery_claim_token"]) == ("success", None, "tok")
    why = body["result"].pop("why")
    assert why.startswith("the result is of 5")
    assert why.endswith("bytes, over the limit of 262144")
    assert body["result"] == {"shortened": True, "done": 5000, "all": True}
    assert (
        len(
            frames.command_result(
                "failed",
                {"k" * 300_000: 1, **{f"n{number}": 10**300 for number in range(1000)}},
                "e" * 9000,
                None,
            )
        )
        < 30_000
    )


def test_error_text_is_cut_to_model_limit():
    """An error text is cut to the limit of the frame model."""
    assert len(json.loads(frames.command_result("failed", None, "x" * 9000, None))["error"]) == 8192


def test_heartbeat_is_valid_for_core_model():
    """The verifier accepts a heartbeat with all fields, such as the strictly validated loss."""
    payload = frames.heartbeat(
        buffer_size=10**9,
        dropped_events=3,
        last_flush_at=1.0,
        loss={"buffer_id": "b", "runtime_id": "r", "event_records": 3},
        health={"celery.status": "ok"},
    )
    frame = verifier().parse_and_verify(
        session.Session(HELLO_ACK, SECRET).sign("heartbeat", "hb_1", payload, time.time())
    )
    assert frame.payload.telemetry_loss.event_records == 3
    assert frame.payload.buffer_size == 10_000_000
