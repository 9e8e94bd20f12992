"""The way to the brain, layer by layer: its name, its port, its certificate."""

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

#: Days of a certificate's life that are few enough to speak of.
FEW_DAYS = 14

#: OpenSSL's verification codes, by what they mean for whoever has to repair it.
_EXPIRED, _NOT_YET = 10, 9
_UNKNOWN_CA = frozenset({2, 18, 19, 20, 21, 27})
_OTHER_NAME = frozenset({62, 64})


@dataclass(frozen=True, slots=True)
class Target:
    """The brain's address, and the proxy that leads there, if the environment names one."""

    scheme: str
    host: str
    port: int
    proxy: SplitResult | None = None

    @property
    def first_hop(self) -> tuple[str, int]:
        """Whom this host talks to: the proxy, or the brain."""
        if self.proxy is None:
            return self.host, self.port
        return self.proxy.hostname or "", self.proxy.port or _PORTS.get(self.proxy.scheme, 80)

    @property
    def setting(self) -> str:
        """The setting that names the first hop."""
        return "Z4J_BRAIN_URL" if self.proxy is None else f"{self.scheme.upper()}_PROXY"

    @property
    def through(self) -> str:
        """How to mention the proxy; empty without one, and never with its password."""
        return (
            ""
            if self.proxy is None
            else f" through the proxy {self.first_hop[0]}:{self.first_hop[1]}"
        )


def target_of(brain_url: str) -> Target:
    """Return the target of an address. Raises ``HostConfigurationError`` for one that is none."""
    try:
        parts = urlsplit(brain_url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise HostConfigurationError(
            f"Z4J_BRAIN_URL={brain_url!r} is not an address: {error}"
        ) from None
    if not parts.hostname or not port:
        raise HostConfigurationError(f"Z4J_BRAIN_URL={brain_url!r} is not an http(s) address")
    proxy = None if proxy_bypass(parts.netloc) else getproxies_environment().get(parts.scheme)
    try:
        return Target(parts.scheme, parts.hostname, port, _proxy_parts(proxy))
    except ValueError as error:
        raise HostConfigurationError(
            f"{parts.scheme.upper()}_PROXY is not an address: {describe_error(error)}"
        ) from None


def _proxy_parts(proxy: str | None) -> SplitResult | None:
    if not proxy:
        return None
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if not parts.hostname:
        raise ValueError("it names no host")
    _ = parts.port  # raises for one that is no number
    return parts


def probe_dns(brain_url: str, timeout: float = 5.0) -> ProbeResult:
    """Look up the name of the brain, or of the proxy that will do so, in at most ``timeout`` seconds."""
    target = target_of(brain_url)
    host = target.first_hop[0]
    found: list[Any] = []
    # A thread of its own: the C library waits for dead name servers as long as it pleases.
    asking = threading.Thread(target=_look_up, args=(host, found), name="z4j-dns", daemon=True)
    asking.start()
    asking.join(timeout)
    if not found:
        fix = "check this host's name servers (/etc/resolv.conf)"
        return failed(
            "dns", f"no name server answered for {host} within {timeout:g} s", fix, host=host
        )
    if isinstance(found[0], Exception):
        fix = f"check the host name in {target.setting}, and this host's name servers"
        number = getattr(found[0], "errno", None)
        return failed(
            "dns", f"{host} is not a known name ({describe_error(found[0])})", fix, host=host, errno=number
        )
    return passed(
        "dns", f"{host} is {', '.join(found[0])}{target.through}", host=host, addresses=found[0]
    )


def _look_up(host: str, found: list[Any]) -> None:
    try:
        found.append(
            sorted(
                {
                    str(each[4][0])
                    for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                }
            )
        )
    except Exception as error:  # eventlet's resolver has errors of its own
        found.append(error)


def probe_tcp(brain_url: str, timeout: float = 5.0) -> ProbeResult:
    """Connect to the brain's port, or the proxy's."""
    target = target_of(brain_url)
    host, port = target.first_hop
    where: dict[str, Any] = {"host": host, "port": port}
    began = time.monotonic()
    try:
        with closing(socket.create_connection((host, port), timeout)):
            pass
    except TimeoutError:
        fix = "look for a firewall or a security group between here and there"
        return failed(
            "tcp", f"{host}:{port} does not answer within {timeout:g} s", fix, errno=None, **where
        )
    except ConnectionRefusedError as error:
        fix = f"check the port in {target.setting}, and whether the brain runs"
        return failed("tcp", f"nobody listens on {host}:{port}", fix, errno=error.errno, **where)
    except OSError as error:
        fix = f"check {target.setting} and this host's routes"
        return failed(
            "tcp",
            f"{host}:{port} cannot be reached ({describe_error(error)})",
            fix,
            errno=error.errno,
            **where,
        )
    took = (time.monotonic() - began) * 1000
    return passed("tcp", f"connected to {host}:{port} in {took:.1f} ms", **where)


def probe_tls(brain_url: str, timeout: float = 5.0, context: Any = None) -> ProbeResult:
    """Shake hands under TLS as the agent would, and look at the certificate.

    :param context: an ``ssl.SSLContext``; without it, the one that ``Z4J_CA_BUNDLE`` and its like make.
    """
    target = target_of(brain_url)
    if target.scheme != "https":
        return skipped("tls", "the address is plain http")
    import ssl

    where: dict[str, Any] = {"host": target.host, "port": target.port}
    try:
        certificate, version = _shake_hands(target, context or _context(), timeout)
    except HostConfigurationError as error:
        return failed(
            "tls", str(error), "name a PEM file that exists and holds certificates", **where
        )
    except ssl.SSLCertVerificationError as error:
        return failed("tls", *_verdict(target, error), verify_message=error.verify_message, **where)
    except ssl.SSLError as error:
        fix = "check scheme and port in Z4J_BRAIN_URL: does the brain's port speak http, or want a client certificate?"
        return failed(
            "tls", f"no TLS with {target.host}:{target.port} ({describe_error(error)})", fix, **where
        )
    except (OSError, HTTPException) as error:
        fix = f"check {target.setting}, and what stands between here and there"
        return failed(
            "tls",
            f"the line broke during the handshake{target.through} ({describe_error(error)})",
            fix,
            **where,
        )
    return _dated(certificate, version, where)


def _context() -> ssl.SSLContext:
    from z4j_bare.settings import load_settings
    from z4j_bare.transport.endpoint import tls_context

    settings = load_settings()
    context: ssl.SSLContext = tls_context(
        settings.ca_bundle, settings.client_cert, settings.client_key
    )
    return context


def _shake_hands(target: Target, context: Any, timeout: float) -> tuple[dict[str, Any], str]:
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


def _verdict(target: Target, error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    """Return cause and fix of a certificate that was refused."""
    code = error.verify_code
    if code == _EXPIRED:
        return (
            f"the certificate of {target.host} has expired",
            "renew it, or set this host's clock if it is ahead",
        )
    if code == _NOT_YET:
        return (
            f"the certificate of {target.host} is not valid yet",
            "set this host's clock (NTP), or wait",
        )
    if code in _UNKNOWN_CA:
        cause = f"the certificate of {target.host} comes from an authority unknown to this host ({error.verify_message})"
        return (
            cause,
            "set Z4J_CA_BUNDLE to a PEM file with that authority's certificate (a private or company CA?)",
        )
    if code in _OTHER_NAME:
        return (
            f"the certificate is not for {target.host}",
            "use the name that the certificate bears in Z4J_BRAIN_URL",
        )
    return (
        f"the certificate of {target.host} is refused ({error.verify_message})",
        "have the brain's certificate mended",
    )


def _dated(certificate: dict[str, Any], version: str, where: dict[str, Any]) -> ProbeResult:
    import ssl

    until = str(certificate.get("notAfter", ""))
    days = int((ssl.cert_time_to_seconds(until) - time.time()) // 86400) if until else None
    names = dict(pair for group in certificate.get("subject", ()) for pair in group)
    details = {
        **where,
        "tls_version": version,
        "cn": names.get("commonName", ""),
        "not_after": until,
        "days_left": days,
    }
    if days is not None and days < FEW_DAYS:
        return warned(
            "tls",
            f"{version}, but the certificate expires in {days} days",
            "have it renewed",
            **details,
        )
    return passed("tls", f"{version}, the certificate is good for {days} more days", **details)
