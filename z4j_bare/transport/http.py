"""HTTP for the brain's long-poll routes: ``requests``, on sockets whose waits go through the backend.

This module imports ``requests``; whoever may never need it imports this one late.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, ProxyError

from z4j_bare.errors import ForkedChildError, NetworkError
from z4j_bare.transport.cooperative_socket import CooperativeSocket
from z4j_bare.transport.error_text import short

if TYPE_CHECKING:
    from z4j_bare.concurrency import BaseConcurrency

#: Seconds for DNS, TCP and TLS together per address.
CONNECT_TIMEOUT = 10.0

#: Seconds after which an idle connection is not used again: the brain closes one after 5, and a request that crosses with
#: that would look like a broken line.
KEEP = 4.0

#: Bytes of one answer at most; 50 commands are far below.
LONGEST = 16 * 1024 * 1024

#: What comes of addresses and answers that are none; ``TypeError`` of a proxy without a host.
_MALFORMED = (ValueError, TypeError)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ``headers`` knows no case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after(self) -> float | None:
        """The server's wish in seconds; the form with a date is rare and counts as absent."""
        text = self.headers.get("Retry-After", "")
        return float(text) if text.isdecimal() else None


class Wire:
    """A connected socket as ``http.client`` wants it, over a :class:`CooperativeSocket`: fork-guarded, breakable from any task."""

    def __init__(self, sock: Any, backend: BaseConcurrency) -> None:
        self._line = CooperativeSocket(sock, backend, CONNECT_TIMEOUT, CONNECT_TIMEOUT)
        self._readers = 0
        self._closed = False

    def sendall(self, data: Any) -> None:
        """Write all of ``data``."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._line.send(rest) :]  # type: ignore[arg-type]  # a socket takes any buffer

    def makefile(self, *_mode: Any, **_options: Any) -> io.BufferedReader:
        """Return a reader; the socket outlives ``close`` until its readers are closed too, as with a real one."""
        self._readers += 1
        return io.BufferedReader(_Reader(self._line, self._released))

    def settimeout(self, timeout: float | None) -> None:
        """Take the seconds without progress after which a read or a write gives up."""
        if timeout is not None:
            self._line.settimeout(timeout)
            self._line.send_timeout = timeout

    def fileno(self) -> int:
        """Return the file descriptor, -1 once closed."""
        return self._line.fileno()

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """Break the line; wakes whoever waits for it."""
        try:
            self._line.shutdown(how)
        except OSError:
            pass  # already gone, which is what was wanted

    def close(self) -> None:
        """Release the file descriptor, now or with the last reader."""
        self._closed = True
        self._release()

    def _released(self) -> None:
        self._readers -= 1
        self._release()

    def _release(self) -> None:
        if self._closed and self._readers <= 0:
            self._line.close()


class _Reader(io.RawIOBase):
    def __init__(self, line: CooperativeSocket, released: Callable[[], None]) -> None:
        super().__init__()
        self._line = line
        self._released = released

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._line.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._released()


class Client:
    """One connection to the brain at a time, kept while it is in use.

    :param base: address that paths are added to.
    :param headers: sent with each request.
    :param tls: an ``ssl.SSLContext`` for an ``https`` address; nothing else decides about certificates.

    Proxies come from the environment, ``NO_PROXY`` included; nothing else does: a ``.netrc`` would replace the token.
    """

    def __init__(
        self, base: str, headers: Mapping[str, str], backend: BaseConcurrency, tls: Any = None
    ) -> None:
        self._base = base
        self._backend = backend
        self._used = 0.0
        self._aborted = False
        self._wire: Wire | None = None
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.proxies.update(get_environ_proxies(base))
        # Long-polling is a conversation with one process: whatever a load balancer sets to keep it there goes back to it.
        self._session.headers.update(
            {"User-Agent": "z4j-bare", "Accept-Encoding": "identity", **headers}
        )
        adapter = _Adapter(tls, self._dress, backend)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def call(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Make one request, whatever its status; redirects are not followed. ``timeout``: seconds without a byte.

        Raises ``NetworkError``.
        """
        if self._backend.forked():
            raise ForkedChildError
        if self._backend.now() - self._used > KEEP:
            self._session.close()
        try:
            response = self._session.request(
                method, self._base + path, data=body, headers=dict(headers or {}), timeout=(CONNECT_TIMEOUT, timeout),
                allow_redirects=False, stream=True,
            )  # fmt: skip
            with response:
                content = b"".join(_bounded(response.iter_content(64 * 1024)))
        except (requests.RequestException, HTTPError, OSError, *_MALFORMED) as error:
            raise NetworkError(f"cannot reach the brain: {short(_root(error))}") from None
        self._used = self._backend.now()
        return Answer(response.status_code, response.headers, content)

    def abort(self) -> None:
        """Break the connection from any task, and let there be no other. Idempotent; not for a forked child."""
        self._aborted = True
        wire = self._wire
        if wire is not None and not self._backend.forked():
            wire.shutdown()

    def close(self) -> None:
        """Release the connection. For the owner only."""
        self._aborted = True
        if not self._backend.forked():
            self._session.close()

    def share_cookies(self, other: Client) -> None:
        """Use the cookies of ``other``."""
        self._session.cookies = other._session.cookies

    def _dress(self, sock: Any) -> Wire:
        wire = Wire(sock, self._backend)
        if self._aborted:
            wire.close()
            raise OSError("the line is closed")
        self._wire = wire
        return wire


class _Adapter(HTTPAdapter):
    """Puts our TLS context and our sockets under ``requests``, proxied or not."""

    def __init__(self, tls: Any, dress: Callable[[Any], Wire], backend: BaseConcurrency) -> None:
        self._tls = tls
        self._pools = _pools(dress, backend)
        super().__init__(pool_connections=1, pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._tls, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.lower().startswith("socks"):  # its pools are of its own kind
            return super().proxy_manager_for(proxy, ssl_context=self._tls, **options)
        manager: Any = super().proxy_manager_for(
            proxy, ssl_context=self._tls, proxy_ssl_context=self._tls, **options
        )
        manager.pool_classes_by_scheme = self._pools
        return manager

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        del url, verify, cert  # requests would add authorities of its own to the context
        if isinstance(conn, HTTPSConnectionPool):
            conn.cert_reqs = "CERT_REQUIRED"


def _pools(dress: Callable[[Any], Wire], backend: BaseConcurrency) -> dict[str, Any]:
    class _CooperativeConnection:
        sock: Any

        def connect(self) -> None:
            connection: Any = super()
            backend.call_blocking(connection.connect)
            self.sock = dress(self.sock)

        @property
        def is_connected(self) -> bool:  # looks with a patched select, which lets the whole hub run
            connection: Any = super()
            return bool(backend.call_blocking(lambda: connection.is_connected))

    class Plain(_CooperativeConnection, HTTPConnection):
        pass

    class Secure(_CooperativeConnection, HTTPSConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def _bounded(chunks: Iterator[bytes]) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > LONGEST:
            raise ValueError(f"an answer of more than {LONGEST} bytes")
        yield chunk


def _root(error: BaseException) -> BaseException:
    """Return what happened, from under the layers of ``requests`` and ``urllib3``; that it was the proxy stays."""
    while not isinstance(error, ProxyError):
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((each for each in error.args if isinstance(each, BaseException)), None)
        if inner is None:
            break
        error = inner
    return error
