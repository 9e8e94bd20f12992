"""Probes of the network between this host and the brain: DNS, TCP, TLS."""

from __future__ import annotations

import base64
import socket
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from z4j_bare.diagnostics.result import ProbeResult, failed, passed, skipped, warned
from z4j_bare.errors import HostConfigurationError
from z4j_bare.transport.error_text import describe_error

if TYPE_CHECKING:
    import ssl

_PORTS = {"http": 80, "https": 443}

#: :func:`probe_tls` warns if the certificate is valid for fewer days than this number.
EXPIRY_WARNING_DAYS = 14

#: The fix for an invalid ``Z4J_CA_BUNDLE``, ``Z4J_CLIENT_CERT`` or ``Z4J_CLIENT_KEY``.
FIX_PEM_FILE = "set the variable to a PEM file that exists and contains certificates"

#: OpenSSL's codes of certificate verification errors, grouped by the fix.
_EXPIRED, _NOT_YET_VALID = 10, 9
_UNKNOWN_AUTHORITY = frozenset({2, 18, 19, 20, 21, 27})
_WRONG_NAME = frozenset({62, 64})


@dataclass(frozen=True, slots=True)
class Target:
    """The brain's address, and the proxy to the brain if the environment names one."""

    scheme: str
    host: str
    port: int
    proxy: SplitResult | None = None

    @property
    def first_hop(self) -> tuple[str, int]:
        """Host and port of the proxy, or of the brain if there is no proxy."""
        if self.proxy is None:
            return self.host, self.port
        return self.proxy.hostname or "", self.proxy.port or _PORTS.get(self.proxy.scheme, 80)

    @property
    def setting(self) -> str:
        """Name of the environment variable that contains the address of the first hop."""
        return "Z4J_BRAIN_URL" if self.proxy is None else f"{self.scheme.upper()}_PROXY"

    @property
    def via_proxy(self) -> str:
        """Text that names the proxy in messages, without the password; empty without a proxy."""
        if self.proxy is None:
            return ""
        return f" through the proxy {self.first_hop[0]}:{self.first_hop[1]}"


def parse_target(brain_url: str) -> Target:
    """Parse the brain's address and find the proxy to the brain.

    Raises ``HostConfigurationError`` if the brain's or the proxy's address is invalid.
    """
    try:
        parts = urlsplit(brain_url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise HostConfigurationError(
            f"Z4J_BRAIN_URL={brain_url!r} is not a valid address: {error}"
        ) from None
    if not parts.hostname or not port:
        raise HostConfigurationError(
            f"Z4J_BRAIN_URL={brain_url!r} is not an address of the form https://HOST[:PORT]"
        )
    proxy = None if proxy_bypass(parts.netloc) else getproxies_environment().get(parts.scheme)
    try:
        return Target(parts.scheme, parts.hostname, port, _parse_proxy(proxy))
    except ValueError as error:
        raise HostConfigurationError(
            f"{parts.scheme.upper()}_PROXY is not a valid address: {describe_error(error)}"
        ) from None


def _parse_proxy(proxy: str | None) -> SplitResult | None:
    if not proxy:
        return None
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if not parts.hostname:
        raise ValueError("it contains no host name")
    _ = parts.port  # raises ValueError if the port is not a number
    return parts


def probe_dns(brain_url: str, timeout: float = 5.0) -> ProbeResult:
    """Resolve the host name of the proxy, or of the brain if there is no proxy.

    :param timeout: maximum seconds until the answer.
    """
    target = parse_target(brain_url)
    host = target.first_hop[0]
    answers: list[list[str] | Exception] = []
    # getaddrinfo has no timeout. Therefore a separate thread calls it.
    thread = threading.Thread(target=_resolve, args=(host, answers), name="z4j-dns", daemon=True)
    thread.start()
    thread.join(timeout)
    if not answers:
        fix = "check this host's name servers (/etc/resolv.conf)"
        cause = f"no name server answered for {host} within {timeout:g} s"
        return failed("dns", cause, fix, host=host)
    answer = answers[0]
    if isinstance(answer, Exception):
        fix = f"check the host name in {target.setting}, and this host's name servers"
        number = getattr(answer, "errno", None)
        cause = f"cannot resolve {host} ({describe_error(answer)})"
        return failed("dns", cause, fix, host=host, errno=number)
    text = f"{host} resolves to {', '.join(answer)}{target.via_proxy}"
    return passed("dns", text, host=host, addresses=answer)


def _resolve(host: str, answers: list[list[str] | Exception]) -> None:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        answers.append(sorted({str(each[4][0]) for each in infos}))
    except Exception as error:  # eventlet's resolver raises its own exceptions
        answers.append(error)


def probe_tcp(brain_url: str, timeout: float = 5.0) -> ProbeResult:
    """Connect to the port of the proxy, or of the brain if there is no proxy.

    :param timeout: maximum seconds until the connection is established.
    """
    target = parse_target(brain_url)
    host, port = target.first_hop
    address: dict[str, Any] = {"host": host, "port": port}
    began = time.monotonic()
    try:
        with closing(socket.create_connection((host, port), timeout)):
            pass
    except TimeoutError:
        cause = f"{host}:{port} does not answer within {timeout:g} s"
        fix = "check whether a firewall or a security group blocks the connection"
        return failed("tcp", cause, fix, errno=None, **address)
    except ConnectionRefusedError as error:
        cause = f"{host}:{port} refuses the connection"
        fix = f"check the port in {target.setting}, and whether the brain is running"
        return failed("tcp", cause, fix, errno=error.errno, **address)
    except OSError as error:
        cause = f"cannot connect to {host}:{port} ({describe_error(error)})"
        fix = f"check {target.setting} and this host's routes"
        return failed("tcp", cause, fix, errno=error.errno, **address)
    milliseconds = (time.monotonic() - began) * 1000
    return passed("tcp", f"connected to {host}:{port} in {milliseconds:.1f} ms", **address)


def probe_tls(
    brain_url: str, timeout: float = 5.0, context: ssl.SSLContext | None = None
) -> ProbeResult:
    """Perform the TLS handshake with the agent's settings and check the certificate.

    :param timeout: maximum seconds of each network operation of the handshake.
    :param context: TLS context of the handshake. The default context is built from
        ``Z4J_CA_BUNDLE``, ``Z4J_CLIENT_CERT`` and ``Z4J_CLIENT_KEY``.
    """
    target = parse_target(brain_url)
    if target.scheme != "https":
        return skipped("tls", "the address is plain http")
    import ssl

    address: dict[str, Any] = {"host": target.host, "port": target.port}
    try:
        certificate, version = _handshake(target, context or _default_context(), timeout)
    except HostConfigurationError as error:
        return failed("tls", str(error), FIX_PEM_FILE, **address)
    except ssl.SSLCertVerificationError as error:
        cause, fix = _certificate_problem(target, error)
        return failed("tls", cause, fix, verify_message=error.verify_message, **address)
    except ssl.SSLError as error:
        cause = (
            f"the TLS handshake with {target.host}:{target.port} failed ({describe_error(error)})"
        )
        fix = (
            "check scheme and port in Z4J_BRAIN_URL: "
            "does the port speak plain http, or require a client certificate?"
        )
        return failed("tls", cause, fix, **address)
    except (OSError, HTTPException) as error:
        cause = (
            f"the connection broke during the handshake{target.via_proxy} ({describe_error(error)})"
        )
        fix = f"check {target.setting}, and any proxy or firewall on the way"
        return failed("tls", cause, fix, **address)
    return _check_expiry(certificate, version, address)


def _default_context() -> ssl.SSLContext:
    from z4j_bare.settings import load_settings
    from z4j_bare.transport.endpoint import tls_context

    settings = load_settings()
    context: ssl.SSLContext = tls_context(
        settings.ca_bundle, settings.client_cert, settings.client_key
    )
    return context


def _handshake(
    target: Target, context: ssl.SSLContext, timeout: float
) -> tuple[dict[str, Any], str]:
    """Perform the handshake; return the fields of the certificate and the TLS version."""
    host, port = target.first_hop
    connection: HTTPConnection = HTTPSConnection(host, port, timeout=timeout, context=context)
    if target.proxy is not None:
        connection.set_tunnel(target.host, target.port, headers=_proxy_headers(target.proxy))
    with closing(connection):
        connection.connect()
        sock: Any = connection.sock
        return sock.getpeercert() or {}, str(sock.version())


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _certificate_problem(target: Target, error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    """Return cause and fix for a certificate that failed verification."""
    certificate = f"the certificate of {target.host}"
    code = error.verify_code
    if code == _EXPIRED:
        return (
            f"{certificate} has expired",
            "renew it; if it has not expired, correct this host's clock",
        )
    if code == _NOT_YET_VALID:
        return (
            f"{certificate} is not valid yet",
            "correct this host's clock (NTP), or wait until the certificate is valid",
        )
    if code in _UNKNOWN_AUTHORITY:
        cause = f"{certificate} was issued by an unknown authority ({error.verify_message})"
        fix = "set Z4J_CA_BUNDLE to a PEM file with the certificate of that authority"
        return cause, fix
    if code in _WRONG_NAME:
        return (
            f"the certificate is not valid for {target.host}",
            "use a host name of the certificate in Z4J_BRAIN_URL",
        )
    return (
        f"{certificate} failed verification ({error.verify_message})",
        "replace the brain's certificate",
    )


def _check_expiry(
    certificate: dict[str, Any], version: str, address: dict[str, Any]
) -> ProbeResult:
    import ssl

    not_after = str(certificate.get("notAfter", ""))
    seconds = ssl.cert_time_to_seconds(not_after) - time.time() if not_after else None
    days = None if seconds is None else int(seconds // 86400)
    names = dict(pair for group in certificate.get("subject", ()) for pair in group)
    details = {
        **address,
        "tls_version": version,
        "cn": names.get("commonName", ""),
        "not_after": not_after,
        "days_left": days,
    }
    if days is not None and days < EXPIRY_WARNING_DAYS:
        cause = f"the certificate expires in {days} days ({version})"
        return warned("tls", cause, "renew the brain's certificate", **details)
    validity = "names no expiry date" if days is None else f"is valid for {days} more days"
    return passed("tls", f"{version}, the certificate {validity}", **details)
