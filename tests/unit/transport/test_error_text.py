"""Errors with an invalid proxy variable, and without its password."""

import logging

import pytest

from z4j_bare.errors import NetworkError
from z4j_bare.transport.error_text import describe_error
from z4j_bare.transport.http import Client
from z4j_bare.transport.websocket import WebSocketTransport, close_error

INVALID_PROXIES = {
    "port-no-number": "http://user:hunter2@127.0.0.1:port",
    "port-too-large": "http://user:hunter2@127.0.0.1:99999",
    "no-host": "http://user:hunter2@",
    "half-a-bracket": "http://user:hunter2@[::1",
    "no-scheme": "user:hunter2@127.0.0.1:9",
    "unknown-scheme": "ftp://user:hunter2@127.0.0.1:9",
    "hash-in-password": "http://user:hunter2#hunter3@127.0.0.1:9",
    "slash-in-password": "http://user:hunter2/hunter3@127.0.0.1:9",
    "at-in-password": "http://user:hunter2@hunter3@127.0.0.1:9",
    "colon-in-password": "http://user:hunter2:hunter3@127.0.0.1:9",
    "refused": "http://user:hunter2@127.0.0.1:9",
}


@pytest.fixture(params=INVALID_PROXIES.values(), ids=INVALID_PROXIES.keys())
def invalid_proxy(request, monkeypatch):
    """An environment with an invalid proxy variable."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, request.param)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def connect(backend, scheme):
    """Connect to a brain by this scheme."""
    if scheme.startswith("http"):
        client = Client(f"{scheme}://192.0.2.1/api/v1", {}, backend)
        try:
            client.request("GET", "/health", timeout=5.0)
        finally:
            client.close()
    else:
        transport = WebSocketTransport(f"{scheme}://192.0.2.1/ws/agent", lambda: "token", backend)
        try:
            transport.upgrade()
        finally:
            transport.close()


@pytest.mark.parametrize("scheme", ["http", "https", "ws", "wss"])
def test_invalid_proxy_raises_network_error_without_password(
    invalid_proxy, backend, caplog, scheme
):
    """An invalid proxy variable raises ``NetworkError``.

    Neither the error nor a log has its password.
    """
    caplog.set_level(logging.DEBUG)
    with pytest.raises(NetworkError) as caught:
        connect(backend, scheme)
    assert "hunter" not in str(caught.value)
    assert "hunter" not in caplog.text


def test_only_proxy_passwords_are_masked(monkeypatch):
    """Other text is kept, and a password of one or two characters is not masked."""
    monkeypatch.setenv("https_proxy", "http://me:a@proxy:1")
    monkeypatch.setenv("all_proxy", "http://proxy:1")
    assert describe_error(ValueError("a proxy\nand more")) == "ValueError: a proxy"
    assert describe_error(TimeoutError()) == "TimeoutError"


def test_control_characters_are_replaced():
    """Text from a peer can neither forge a log line nor control a terminal."""
    assert (
        describe_error(OSError("BadStatusLine: \x1b[2J\r\x07ok"))
        == "OSError: BadStatusLine: ?[2J??ok"
    )
    assert str(close_error(b"\x0f\xa0bye\x1b[0m\nz4j: forged")).isprintable()
