"""Class, delay and message of every close code and HTTP status, through the whole agent."""

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.engines import FakeEngine
from tests.support.http_peer import HttpPeer
from tests.support.peer import AGENT, PROJECT, SECRET_TEXT, TOKEN
from z4j_bare import _process_singleton, install_agent

#: Seconds of the first delay by class; up to 30 % are added by chance.
FIRST = {"connection": 1, "protocol": 1, "auth": 10, "incompatible": 120, "limited": 10}

ONCE, WELCOMED = "instead of a welcome", "after the welcome"


@pytest.fixture
def install():
    """``install(**options)``: a started agent, stopped at the end of the test."""
    made = []

    def make(**options):
        made.append(
            install_agent(
                engines=[FakeEngine()],
                token=TOKEN,
                project_id="demo",
                hmac_secret=SECRET_TEXT,
                **options,
            )
        )
        return made[-1]

    yield make
    for runtime in made:
        runtime.stop(timeout=3)
        _process_singleton.clear_runtime(expected=runtime)


@pytest.fixture
def first_failure(install, until, caplog):
    """``first_failure(**options)``: class, text and delay of a new agent's first failure."""
    caplog.set_level(logging.INFO, "z4j.runtime.pipeline.session")

    def run(**options):
        install(**options)
        record = until(
            lambda: next(
                (each for each in caplog.records if "no session" in each.getMessage()), None
            )
        )
        kind, error, delay = record.args
        assert record.levelname == "WARNING"
        return kind, str(error), delay

    return run


def check_failure(failure, kind, named, wish=0.0):
    """Compare a failure with the expected class, text and delay."""
    found, text, delay = failure
    assert found == kind
    assert named in text
    assert max(wish, FIRST[kind]) <= delay <= max(wish, FIRST[kind] * 1.3)


@pytest.fixture
def http_peer(backend):
    made = HttpPeer(backend)
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("when", "code", "kind", "named"),
    [
        (ONCE, 4400, "protocol", "could not parse a frame"),
        (ONCE, 4401, "auth", "Z4J_TOKEN (or Z4J_TOKEN_FILE)"),
        (ONCE, 4403, "auth", "Z4J_AGENT_IP_ALLOWLIST"),
        (ONCE, 4426, "incompatible", "upgrade z4j-bare or the brain"),
        (ONCE, 4427, "incompatible", "upgrade z4j-bare or the brain"),
        (ONCE, 4429, "limited", "600 connections a minute"),
        (ONCE, 1011, "connection", "failed to process a frame"),
        (ONCE, 1012, "connection", "restarting"),
        (WELCOMED, 4002, "limited", "another process connected with the same worker id"),
        (WELCOMED, 4003, "auth", "create a new Z4J_TOKEN"),
        (WELCOMED, 4400, "protocol", "could not parse a frame"),
        (WELCOMED, 4403, "auth", "Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE)"),
        (WELCOMED, 4408, "connection", "no frame for too long"),
        (WELCOMED, 4429, "limited", "64 sessions, or its setting"),
        (WELCOMED, 1011, "connection", "failed to process a frame"),
        (WELCOMED, 1012, "connection", "restarting"),
        (WELCOMED, 1001, "connection", "shutting down"),
        (WELCOMED, 1000, "connection", "closed the session"),
    ],
)
def test_close_code_has_class_delay_and_hint(peer, first_failure, when, code, kind, named):
    """Each close code, before and after ``hello_ack``, has its class, its delay and a hint."""

    def on_hello(session):
        if when == WELCOMED:
            session.hello_ack()
        session.close(code)

    peer.on_hello = on_hello
    check_failure(first_failure(brain_url=peer.url, transport="ws"), kind, named)


@pytest.mark.parametrize(("ahead", "way"), [(75, "behind"), (-75, "ahead of")])
def test_refused_signature_names_clock_offset(peer, first_failure, ahead, way):
    """When the brain's clock is 75 s off, a refused signature is explained by that offset."""

    def on_hello(session):
        payload = {
            "protocol_version": "2",
            "brain_version": "1",
            "agent_id": AGENT,
            "project_id": PROJECT,
            "session_id": session.id,
        }
        stamp = (datetime.now(UTC) + timedelta(seconds=ahead)).isoformat()
        session.send(
            json.dumps(
                {"v": 2, "type": "hello_ack", "id": "hack_1", "ts": stamp, "payload": payload}
            ).encode()
        )
        session.close(4403)

    peer.on_hello = on_hello
    kind, text, _ = first_failure(brain_url=peer.url, transport="ws")
    assert kind == "auth"
    assert any(
        f"this host's clock is {seconds} s {way} the brain's" in text for seconds in (74, 75, 76)
    )


@pytest.mark.parametrize(
    ("status", "headers", "kind", "named", "wish"),
    [
        (
            302,
            {"Location": "http://127.0.0.1:9/"},
            "connection",
            "a redirect: set Z4J_BRAIN_URL",
            0,
        ),
        (401, {}, "auth", "Z4J_TOKEN", 0),
        (403, {}, "auth", "Z4J_AGENT_IP_ALLOWLIST", 0),
        (404, {}, "connection", "Z4J_BRAIN_URL", 0),
        (429, {"Retry-After": "58"}, "limited", "600 requests", 58),
        (503, {"Retry-After": "7"}, "connection", "HTTP 503", 7),
    ],
)
def test_refused_upgrade_has_class_and_hint(
    peer, first_failure, status, headers, kind, named, wish
):
    """Each HTTP response to an upgrade has its class and hint, and ``Retry-After`` is obeyed."""
    peer.upgrade_rejection = (status, headers)
    check_failure(first_failure(brain_url=peer.url, transport="ws"), kind, named, wish)


PROBE, UPLOAD, POLL = "probe", "upload", "poll"
ARCHIVED = (
    b'{"error":"project_inactive","message":"project is archived","request_id":"r","details":{}}'
)
DENIED = (
    b'{"error":"ip_denied","message":"source not allowed","request_id":"r",'
    b'"details":{"surface":"agent"}}'
)
INVALIDATED = b'{"detail":"long-poll session invalidated; reconnect with a fresh session nonce"}'


@pytest.mark.parametrize("where", [PROBE, UPLOAD, POLL])
@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "named", "wish"),
    [
        (
            400,
            {},
            b'{"error":"invalid_host"}',
            "connection",
            "Z4J_ALLOWED_HOSTS? (invalid_host)",
            0,
        ),
        (401, {}, b'{"detail":"invalid agent token"}', "auth", "Z4J_TOKEN (or Z4J_TOKEN_FILE)", 0),
        (403, {}, ARCHIVED, "auth", "(project is archived)", 0),
        (403, {}, DENIED, "auth", "(source not allowed)", 0),
        (409, {}, INVALIDATED, "connection", "fresh session nonce", 0),
        (422, {}, b'{"detail":[]}', "connection", "HTTP 422", 0),
        (
            429,
            {"Retry-After": "58"},
            b'{"detail":"too many requests"}',
            "limited",
            "(too many requests)",
            58,
        ),
        (502, {}, b"<html>", "connection", "HTTP 502", 0),
        (503, {"Retry-After": "7"}, b'{"detail":"at capacity"}', "connection", "(at capacity)", 7),
    ],
    ids=["400", "401", "403-archived", "403-address", "409", "422", "429", "502", "503"],
)
def test_longpoll_status_has_class_delay_and_reason(
    http_peer, first_failure, where, status, headers, body, kind, named, wish
):
    """Each status of each long-poll route has its class, its delay and the brain's reason."""
    answer = http_peer.answer

    def scripted(request):
        here = (
            UPLOAD
            if request.method == "POST"
            else PROBE
            if request.query.get("max_frames") == "0"
            else POLL
        )
        return (status, headers, body) if here == where else answer(request)

    http_peer.answer = scripted
    if (status, where) == (
        409,
        UPLOAD,
    ):  # a new nonce, well probed: then it is the signature that was refused
        kind, named = (
            "auth",
            (
                "Z4J_HMAC_SECRET (or Z4J_HMAC_SECRET_FILE): "
                "the brain rejected a signature; the clocks differ"
            ),
        )
    check_failure(first_failure(brain_url=http_peer.url, transport="longpoll"), kind, named, wish)


def test_too_large_body_keeps_session(http_peer, install, until):
    """A 413 does not end the session: smaller bodies follow at once."""
    http_peer.body_limit = 2048
    runtime = install(brain_url=http_peer.url, transport="longpoll")
    until(lambda: http_peer.frames("heartbeat"))
    assert len(http_peer.sessions) == 1
    assert runtime.stats()["last_error"] == ""
