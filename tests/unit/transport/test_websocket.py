"""The cooperative socket and the WebSocket transport: URLs, timeouts, TLS and disconnects."""

import datetime as dt
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websocket import ABNF

from tests.support.peer import PING, TOKEN, Peer
from z4j_bare.errors import (
    AuthenticationRejectedError,
    HostConfigurationError,
    NetworkError,
    UnavailableError,
)
from z4j_bare.transport import websocket
from z4j_bare.transport.cooperative_socket import CooperativeSocket
from z4j_bare.transport.endpoint import tls_context, websocket_url
from z4j_bare.transport.websocket import MASK_CHUNK, BinaryFrame, WebSocketTransport, close_error
from z4j_bare.wire.frames import Identity, hello
from z4j_bare.wire.session import parse_hello_ack


@pytest.mark.parametrize(
    ("given", "created"),
    [
        ("https://brain.example.com", "wss://brain.example.com/ws/agent"),
        ("https://brain.example.com:8443/z4j/", "wss://brain.example.com:8443/z4j/ws/agent"),
        ("http://localhost:7700", "ws://localhost:7700/ws/agent"),
        ("http://127.0.0.1:7700/", "ws://127.0.0.1:7700/ws/agent"),
        ("http://[::1]:7700", "ws://[::1]:7700/ws/agent"),
    ],
)
def test_websocket_url_keeps_path_prefix(given, created):
    """The brain's URL becomes that of its WebSocket route, including a path prefix."""
    assert websocket_url(given, dev_mode=False) == created


@pytest.mark.parametrize(
    "given", ["http://brain.example.com", "http://10.0.0.7:7700", "http://localhost.example.com"]
)
def test_plain_http_to_other_host_is_rejected(given):
    """Plain HTTP to another host is rejected unless ``dev_mode`` is set."""
    with pytest.raises(HostConfigurationError, match="in the clear"):
        websocket_url(given, dev_mode=False)
    assert websocket_url(given, dev_mode=True).startswith("ws://")


@pytest.mark.parametrize("given", ["ftp://x", "brain.example.com", "https://", ""])
def test_invalid_url_names_setting(given):
    """A URL that is not HTTP is rejected with the name of the setting."""
    with pytest.raises(HostConfigurationError, match="Z4J_BRAIN_URL"):
        websocket_url(given, dev_mode=True)


def test_close_error_reads_code_and_reason():
    """The code and reason of a close frame are read. An empty body is a lost connection."""
    assert close_error(struct.pack("!H", 4401) + b"who are you").code == 4401
    assert isinstance(close_error(struct.pack("!H", 4401)), AuthenticationRejectedError)
    assert close_error(b"").code is None
    assert close_error(b"\x03").code is None
    assert "\ufffd" in str(close_error(struct.pack("!H", 1011) + b"\xff"))


# -- binary frames

SIZES = (
    0,
    1,
    125,
    126,
    MASK_CHUNK - 1,
    MASK_CHUNK,
    MASK_CHUNK + 1,
    2 * MASK_CHUNK,
    (1 << 16) - 1,
    1 << 16,
    70_001,
)


@given(
    st.binary(min_size=4, max_size=4),
    st.sampled_from(SIZES) | st.integers(0, 3 * MASK_CHUNK),
    st.randoms(),
)
def test_binary_frame_equals_library_frame(key, size, random):
    """A message of any size is the frame that websocket-client makes of it with the same key."""
    data = random.randbytes(size)
    theirs, ours = ABNF.create_frame(data, ABNF.OPCODE_BINARY), BinaryFrame(data)
    theirs.get_mask_key = ours.get_mask_key = lambda length: key[:length]
    assert ours.format() == theirs.format()


def test_binary_frames_have_random_masks():
    """Each message has its own random mask."""
    assert len({BinaryFrame(b"x" * 8).format() for _ in range(16)}) == 16


# -- the cooperative socket


@pytest.fixture
def socket_pair(backend):
    left, right = socket.socketpair()
    yield CooperativeSocket(left, backend, 0.05, 0.05), right
    left.close()
    right.close()


def test_recv_returns_requested_sizes(socket_pair):
    """Bytes are returned in the requested sizes, whatever sizes arrived."""
    sock, other = socket_pair
    other.sendall(b"abcdef")
    assert (sock.recv(1), sock.recv(2), sock.recv(10)) == (b"a", b"bc", b"def")


def test_recv_and_send_time_out(socket_pair):
    """Reads and writes time out after their own timeouts."""
    sock, _other = socket_pair
    with pytest.raises(TimeoutError):
        sock.recv(1)
    with pytest.raises(TimeoutError):
        [sock.send(b"x" * 65536) for _ in range(1000)]
    sock.settimeout(0.01)
    sock.settimeout(None)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    with pytest.raises(BlockingIOError):
        sock.try_send(b"x")
    assert sock.gettimeout() == 0


def test_shutdown_wakes_reader(socket_pair, backend, until):
    """A waiting reader sees the end of the stream after a shutdown by either side."""
    sock, other = socket_pair
    sock.settimeout(20)
    got = []
    task = backend.spawn(lambda: got.append(sock.recv(1)), name="reader")
    backend.sleep(0.02)
    sock.shutdown(socket.SHUT_RDWR)
    assert task.join(10)
    assert got == [b""]
    assert other.recv(1) == b""
    sock.close()
    assert sock.fileno() == -1


# -- the transport


def a_hello():
    now = dt.datetime.now(dt.UTC)
    return hello(
        Identity(
            framework="bare",
            agent_version="1.13.0",
            worker_id="w-1",
            worker_pid=1,
            worker_started_at=now,
        )
    )


@pytest.fixture
def make_transport(backend):
    created = []

    def make(peer, tls=None):
        created.append(
            WebSocketTransport(websocket_url(peer.url, dev_mode=False), lambda: TOKEN, backend, tls)
        )
        return created[-1]

    yield make
    for transport in created:
        transport.close()


def test_session_connects_exchanges_and_closes(peer, make_transport, until):
    """A session connects, exchanges messages, and can be closed repeatedly."""
    transport = make_transport(peer)
    assert parse_hello_ack(transport.connect(a_hello())).session_id == peer.sessions[0].id
    assert transport.receive(0.01) is None
    peer.last.send(b"to the agent")
    assert transport.receive(10) == b"to the agent"
    peer.last.send(b"x" * 300_000)
    assert transport.receive(10) == b"x" * 300_000
    session = peer.last
    transport.close()
    transport.close()
    transport.abort()
    until(lambda: session.close_code == 1000)
    for use in (lambda: transport.send(bytes), lambda: transport.receive(0.01)):
        with pytest.raises(NetworkError, match="closed"):
            use()


def test_message_in_single_bytes_is_assembled(peer, make_transport, backend):
    """A message that arrives byte by byte with pauses beyond the read timeout is assembled."""
    transport = make_transport(peer)
    transport.connect(a_hello())
    session = peer.last

    def dribble():
        for byte in b"\x82\x05hello":
            session.send_raw(bytes([byte]))
            backend.sleep(0.02)

    backend.spawn(dribble, name="dribble")
    got = None
    while got is None:
        got = transport.receive(0.005)
    assert got == b"hello"


def test_fragmented_message_with_ping_is_assembled(peer, make_transport, until):
    """A fragmented message with a ping in the middle is one message, and the ping is answered."""
    transport = make_transport(peer)
    transport.connect(a_hello())
    peer.last.send_raw(b"\x02\x03one" + b"\x89\x01!" + b"\x80\x03two")
    got = [message for message in (transport.receive(0.3) for _ in range(3)) if message is not None]
    assert got == [b"onetwo"]
    until(lambda: peer.last.pongs == 1)


def assert_abort_wakes_reader(transport, backend):
    got = []

    def read():
        try:
            transport.receive(30)
        except NetworkError as error:
            got.append(error)

    task = backend.spawn(read, name="reader")
    backend.sleep(0.02)
    transport.abort()
    assert task.join(10)
    assert len(got) == 1


def test_abort_wakes_reader(peer, make_transport, backend):
    """A waiting reader raises an error when another task aborts."""
    transport = make_transport(peer)
    transport.connect(a_hello())
    assert_abort_wakes_reader(transport, backend)


def test_close_code_after_upgrade_is_reported(peer, make_transport):
    """The close code is reported although the brain closes before ``hello`` arrives."""
    peer.token = "another"
    for _ in range(10):
        with pytest.raises(AuthenticationRejectedError) as caught:
            make_transport(peer).connect(a_hello())
        assert caught.value.code == 4401


def test_failing_build_keeps_connection_usable(peer, make_transport, until):
    """A frame that cannot be built is not sent, and the connection stays usable."""
    transport = make_transport(peer)
    transport.connect(a_hello())
    with pytest.raises(ZeroDivisionError):
        transport.send(lambda: 1 // 0)
    transport.send(lambda: b"this will not verify")
    until(lambda: peer.errors)


def test_full_socket_raises_after_send_timeout(peer, make_transport, monkeypatch):
    """A peer that stops reading causes ``NetworkError`` after the send timeout."""
    monkeypatch.setattr(websocket, "SEND_TIMEOUT", 0.1)
    transport = make_transport(peer)
    transport.connect(a_hello())
    peer.last.stalled = True
    with pytest.raises(NetworkError, match="while sending"):
        [transport.send(lambda: b"x" * 1_000_000) for _ in range(200)]


@pytest.fixture
def mute():
    """A TCP listener whose connections are accepted by the kernel and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


class Address:
    """A URL in place of a peer."""

    def __init__(self, url):
        self.url = url


@pytest.mark.filterwarnings("ignore:please use dns.resolver:DeprecationWarning")  # eventlet's own
def test_failure_before_upgrade_says_nothing_about_websocket(
    make_transport, certificate, mute, monkeypatch
):
    """A refused connection, an unknown host and a TLS timeout raise ``UnavailableError``."""
    monkeypatch.setattr(websocket, "CONNECT_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}"
    tls = tls_context(certificate, None, None)
    for url, context in (
        (refusing, None),
        ("https://brain.invalid", tls),
        (f"https://127.0.0.1:{mute}", tls),
    ):
        with pytest.raises(UnavailableError, match="cannot reach the brain"):
            make_transport(Address(url), context).connect(b"{}")


def test_silence_during_upgrade_may_mean_blocked_websocket(make_transport, mute, monkeypatch):
    """A connection that gets no answer to the upgrade raises a plain ``NetworkError``."""
    monkeypatch.setattr(websocket, "CONNECT_TIMEOUT", 0.3)
    with pytest.raises(NetworkError) as caught:
        make_transport(Address(f"http://127.0.0.1:{mute}")).connect(b"{}")
    assert not isinstance(caught.value, UnavailableError)


def test_silence_after_upgrade_says_nothing_about_websocket(peer, make_transport, monkeypatch):
    """Without ``hello_ack`` the error names an overloaded brain, and the cure for a proxy."""
    monkeypatch.setattr(websocket, "HELLO_TIMEOUT", 0.3)
    peer.on_hello = lambda session: session.send(b"", PING)
    with pytest.raises(UnavailableError, match=r"overloaded.*Z4J_TRANSPORT=longpoll"):
        make_transport(peer).connect(a_hello())


def test_closed_port_raises_network_error(make_transport, backend):
    """A closed port raises ``NetworkError``."""
    gone = Peer(backend)
    gone.stop()
    with pytest.raises(NetworkError, match="cannot reach the brain"):
        make_transport(gone).connect(a_hello())


# -- TLS


@pytest.fixture
def tls_peer(backend, server_tls):
    created = Peer(backend, tls=server_tls)
    yield created
    created.stop()


def test_tls_session_works_in_both_directions(
    tls_peer, make_transport, certificate, backend, until
):
    """Over TLS both directions work at the same time, and no message is damaged."""
    transport = make_transport(tls_peer, tls_context(certificate, None, None))
    transport.connect(a_hello())
    session = tls_peer.last
    got, number = [], 60

    def read():
        while len(got) < number:
            message = transport.receive(1.0)
            if message is not None:
                got.append(message)

    task = backend.spawn(read, name="reader")
    for turn in range(number):
        session.send(b"%d " % turn * 5000)
        transport.send(a_hello)  # the peer ignores it during a session
    assert task.join(20)
    assert got == [b"%d " % turn * 5000 for turn in range(number)]
    transport.close()
    until(lambda: session.ended)


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # raised by eventlet itself
def test_unknown_certificate_is_rejected_before_token(tls_peer, make_transport):
    """An untrusted certificate ends the connection before the token is sent."""
    with pytest.raises(NetworkError, match="certificate verify failed"):
        make_transport(tls_peer, tls_context(None, None, None)).connect(a_hello())
    assert all(session.headers == {} for session in tls_peer.sessions)


def test_abort_wakes_tls_reader(tls_peer, make_transport, certificate, backend):
    """A waiting TLS reader raises an error when another task aborts."""
    transport = make_transport(tls_peer, tls_context(certificate, None, None))
    transport.connect(a_hello())
    assert_abort_wakes_reader(transport, backend)
