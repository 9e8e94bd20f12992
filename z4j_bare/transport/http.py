"""An HTTP client: ``requests`` on sockets that wait through the concurrency backend.

The agent imports this module only if it needs long-poll, because the import of ``requests`` is
slow.
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
from z4j_bare.transport.error_text import describe_error

if TYPE_CHECKING:
    import ssl

    from z4j_bare.concurrency import BaseConcurrency

#: Timeout in seconds of DNS, TCP and TLS together, for each address of the brain's host.
CONNECT_TIMEOUT = 10.0

#: Seconds after which an idle connection is not used again.
#: The brain closes an idle connection after 5 s, and a request at that moment would fail.
KEEPALIVE_SECONDS = 4.0

#: Maximum bytes of a response.
MAX_RESPONSE_BYTES = 16 * 1024 * 1024

#: Maximum bytes of a response that are read in one step.
_READ_SIZE = 64 * 1024

#: Exceptions of the libraries for malformed URLs and responses.
#: A proxy URL without a host raises ``TypeError``.
_MALFORMED = (ValueError, TypeError)


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response. The names in ``headers`` are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after(self) -> float | None:
        """The seconds in ``Retry-After``; ``None`` if the header is absent or a date."""
        text = self.headers.get("Retry-After", "")
        return float(text) if text.isdecimal() else None


class HttpSocket:
    """A connected socket for ``http.client``, based on :class:`CooperativeSocket`.

    Any task may call ``shutdown``.
    """

    def __init__(self, sock: socket.socket, backend: BaseConcurrency) -> None:
        self._socket = CooperativeSocket(sock, backend, CONNECT_TIMEOUT, CONNECT_TIMEOUT)
        self._readers = 0
        self._closed = False

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._socket.send(rest) :]  # type: ignore[arg-type]  # send accepts any buffer

    def makefile(self, *_mode: object, **_options: object) -> io.BufferedReader:
        """Return a buffered reader. The descriptor stays open until all readers are closed."""
        self._readers += 1
        return io.BufferedReader(_Reader(self._socket, self._reader_closed))

    def settimeout(self, timeout: float | None) -> None:
        """Set the seconds that one read or write may wait; ``None`` keeps the current timeouts."""
        if timeout is not None:
            self._socket.settimeout(timeout)
            self._socket.send_timeout = timeout

    def fileno(self) -> int:
        """Return the file descriptor, or -1 after ``close``."""
        return self._socket.fileno()

    def shutdown(self, how: int = socket.SHUT_RDWR) -> None:
        """Shut the connection down and wake all waiting reads and writes."""
        try:
            self._socket.shutdown(how)
        except OSError:
            pass  # the connection is already closed

    def close(self) -> None:
        """Release the file descriptor when all readers are closed."""
        self._closed = True
        self._release()

    def _reader_closed(self) -> None:
        self._readers -= 1
        self._release()

    def _release(self) -> None:
        if self._closed and self._readers <= 0:
            self._socket.close()


class _Reader(io.RawIOBase):
    def __init__(self, sock: CooperativeSocket, on_close: Callable[[], None]) -> None:
        super().__init__()
        self._socket = sock
        self._on_close = on_close

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._socket.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._on_close()


class Client:
    """An HTTP client with one connection that is kept alive between requests.

    :param base: the URL that paths are appended to.
    :param tls: the TLS context for an ``https`` URL. Only this context decides whether a
        certificate is valid.

    The client uses the proxy variables of the environment, but no ``.netrc`` file, because
    credentials of such a file would replace the token.
    """

    def __init__(
        self,
        base: str,
        headers: Mapping[str, str],
        backend: BaseConcurrency,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._base = base
        self._backend = backend
        self._last_used_at = 0.0
        self._aborted = False
        self._socket: HttpSocket | None = None
        # Cookies of a load balancer are kept, so that all requests reach the same brain process.
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.proxies.update(get_environ_proxies(base))
        self._session.headers.update(
            {"User-Agent": "z4j-bare", "Accept-Encoding": "identity", **headers}
        )
        adapter = _Adapter(tls, self._wrap_socket, backend)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def request(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send a request and return the response, whatever its status is.

        Raises ``NetworkError`` if the connection fails, or if no byte arrives for ``timeout``
        seconds.
        """
        if self._backend.forked():
            raise ForkedChildError
        if self._backend.now() - self._last_used_at > KEEPALIVE_SECONDS:
            self._session.close()
        try:
            response = self._session.request(
                method,
                self._base + path,
                data=body,
                headers=dict(headers or {}),
                timeout=(CONNECT_TIMEOUT, timeout),
                allow_redirects=False,
                stream=True,
            )
            with response:
                content = b"".join(_bounded(response.iter_content(_READ_SIZE)))
        except (requests.RequestException, HTTPError, OSError, *_MALFORMED) as error:
            raise NetworkError(f"cannot reach the brain: {describe_error(_root(error))}") from None
        self._last_used_at = self._backend.now()
        return Response(response.status_code, response.headers, content)

    def abort(self) -> None:
        """Shut down the connection and refuse new connections.

        Any task may call this method. Idempotent. A forked child does not touch the connection,
        because it belongs to the parent.
        """
        self._aborted = True
        if self._socket is not None and not self._backend.forked():
            self._socket.shutdown()

    def close(self) -> None:
        """Release the connection. Only the owner may call this."""
        self._aborted = True
        if not self._backend.forked():
            self._session.close()

    def share_cookies(self, other: Client) -> None:
        """Use the cookie jar of ``other``, so that both clients reach the same brain process."""
        self._session.cookies = other._session.cookies

    def _wrap_socket(self, sock: socket.socket) -> HttpSocket:
        wrapped = HttpSocket(sock, self._backend)
        if self._aborted:
            wrapped.close()
            raise OSError("the connection is closed")
        self._socket = wrapped
        return wrapped


class _Adapter(HTTPAdapter):
    """Makes ``requests`` use the agent's TLS context and sockets, with and without a proxy."""

    def __init__(
        self,
        tls: ssl.SSLContext | None,
        wrap_socket: Callable[[socket.socket], HttpSocket],
        backend: BaseConcurrency,
    ) -> None:
        self._tls = tls
        self._pools = _pools(wrap_socket, backend)
        super().__init__(pool_connections=1, pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._tls, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.lower().startswith("socks"):  # SOCKS needs its own pool classes
            return super().proxy_manager_for(proxy, ssl_context=self._tls, **options)
        manager: Any = super().proxy_manager_for(
            proxy, ssl_context=self._tls, proxy_ssl_context=self._tls, **options
        )
        manager.pool_classes_by_scheme = self._pools
        return manager

    def cert_verify(self, conn: object, url: object, verify: object, cert: object) -> None:
        # The base class is not called, because it would add the CA certificates of ``requests``.
        del url, verify, cert
        if isinstance(conn, HTTPSConnectionPool):
            conn.cert_reqs = "CERT_REQUIRED"


def _pools(
    wrap_socket: Callable[[socket.socket], HttpSocket], backend: BaseConcurrency
) -> dict[str, Any]:
    class _CooperativeConnection:
        sock: Any

        def connect(self) -> None:
            connection: Any = super()
            backend.call_blocking(connection.connect)
            self.sock = wrap_socket(self.sock)

        @property
        def is_connected(self) -> bool:  # urllib3 calls select; a patched select runs the hub
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
        if size > MAX_RESPONSE_BYTES:
            raise ValueError(f"the response has more than {MAX_RESPONSE_BYTES} bytes")
        yield chunk


def _root(error: BaseException) -> BaseException:
    """Return the innermost cause of an error of ``requests`` or ``urllib3``.

    A ``ProxyError`` is not searched, because its cause does not mention the proxy.
    """
    while not isinstance(error, ProxyError):
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        if inner is None:
            break
        error = inner
    return error
