"""After all kinds of failures at log level DEBUG, secrets are only in the process's environment."""

import base64
import secrets
import socket
import stat
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.e2e_host import MODES, TIMEOUT, Host
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

USER = "worker"


class Gateway:
    """A forward proxy with CONNECT and one password; behind it TLS ends at the brain's port.

    ``behaviour`` is ``forward``, a status (``407``, ``502``), or ``close``.
    """

    def __init__(self, port, tls, password):
        self.behaviour = "forward"
        self.served = 0
        self.rejected = 0
        self._port = port
        self._tls = tls
        self._pass = (
            f"Proxy-Authorization: Basic {base64.b64encode(f'{USER}:{password}'.encode()).decode()}"
        )
        self._socks = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://{USER}:{password}@127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """Stop listening and close all connections."""
        for sock in (self._listener, *self._socks):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def reset_connections(self):
        """Break the existing connections."""
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._socks.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with suppress(OSError), sock:
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(65536) or b"\r\n\r\n"
            behaviour = self.behaviour if self._pass in head.decode() else "407"
            if behaviour == "forward":
                self.served += 1
                sock.sendall(b"HTTP/1.1 200 Established\r\n\r\n")
                self._forward(sock)
            else:
                self.rejected += 1
                if behaviour != "close":
                    sock.sendall(
                        f"HTTP/1.1 {behaviour} No\r\nContent-Length: 0\r\n"
                        "Connection: close\r\n\r\n".encode()
                    )

    def _forward(self, sock):
        with (
            self._tls.wrap_socket(sock, server_side=True) as outer,
            socket.create_connection(("127.0.0.1", self._port)) as inner,
        ):
            self._socks += [outer, inner]
            back = threading.Thread(target=_copy, args=(inner, outer), daemon=True)
            back.start()
            _copy(outer, inner)
            back.join()


def _copy(source, target):
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for sock in (source, target):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """A brain that also accepts the host name ``brain.test``."""
    hosts = '["brain.test", "127.0.0.1"]'
    with Brain(
        tmp_path_factory.mktemp("brain"), environment={"Z4J_ALLOWED_HOSTS": hosts}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(brain, server_tls):
    made = Gateway(brain.port, server_tls, secrets.token_urlsafe(24))
    yield made
    made.close()


@pytest.fixture(scope="module")
def hosts(brain, gateway, certificate, tmp_path_factory):
    """A host in each mode and over each transport; all agents belong to one project."""
    project = f"p-{secrets.token_hex(6)}"
    brain.create_project(project)
    with ExitStack() as stack:
        made = []
        for mode in MODES:
            for transport in ("ws", "longpoll"):
                home = tmp_path_factory.mktemp(f"{mode}-{transport}")
                agent = brain.mint_agent(project, home.name)
                variables = {
                    "Z4J_BRAIN_URL": f"https://brain.test:{brain.port}",
                    "Z4J_CA_BUNDLE": str(certificate),
                    "Z4J_TRANSPORT": transport,
                    "FAST_TIMEOUTS": "1",
                    **dict.fromkeys(
                        ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"), gateway.url
                    ),
                }
                made.append(stack.enter_context(Host(mode, agent, home, **variables)))
        for host in made:
            host.wait_installed()
        yield made


def spellings(secret):
    """Return the encodings in which a secret could appear."""
    raw = secret.encode()
    with suppress(ValueError):
        raw = base64.urlsafe_b64decode(secret)
    plain = {secret, secret.rstrip("="), base64.b64encode(secret.encode()).decode().rstrip("=")}
    return (
        plain | {raw.hex(), repr(raw)[2:-1], base64.b64encode(raw).decode().rstrip("=")}
        if raw != secret.encode()
        else plain
    )


def command_lines():
    """Yield the command lines of all processes, which every user can read."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield (process / "cmdline").read_bytes().decode(errors="replace")


def files_of(home):
    return [path for path in home.rglob("*") if path.is_file()]


def failed_with(answer, host):
    error = host.request("stats")["last_error"]
    return bool(error) and answer in error


def run_failures(hosts, gateway, brain):
    """Produce events, all failures of the proxy, and a revoked token; return the texts."""
    each = lambda condition, what: [  # noqa: E731
        until(lambda host=host: condition(host), what, timeout=TIMEOUT) for host in hosts
    ]
    each(lambda host: host.request("stats")["sessions"], "sessions")
    texts = []
    for behaviour, answer in (("407", "407"), ("502", "502"), ("close", "")):
        for host in hosts:
            host.produce("failures", 10, 0.1)
        gateway.behaviour = behaviour
        gateway.reset_connections()
        # The first error is that of the broken connection, not of the proxy.
        each(partial(failed_with, answer), f"a failure {answer}")
        texts += [host.request("expose") for host in hosts]
        gateway.behaviour = "forward"
        each(Host.all_acked, "acks")
    texts += [host.request("expose") for host in hosts]
    for host in hosts:
        assert host.delivered(brain, "failures")
        brain.revoke_agent(host.credentials.project, host.credentials.agent_id)
    each(lambda host: "Z4J_TOKEN" in host.request("stats")["last_error"], "a rejection")
    return texts + [host.request("expose") for host in hosts]


@pytest.fixture(scope="module")
def exposed(hosts, gateway, brain):
    """The texts of the hosts, the process list, and the modes and contents of their files."""
    texts = run_failures(hosts, gateway, brain)
    lines = list(command_lines())
    modes = {
        path: path.stat().st_mode for host in hosts for path in (host.cwd / "agent").rglob("*")
    }
    contents = {path: path.read_bytes() for host in hosts for path in files_of(host.cwd)}
    for host in hosts:
        assert host.finish() == 0
    contents |= {path: path.read_bytes() for host in hosts for path in files_of(host.cwd)}
    return {"texts": texts, "lines": lines, "modes": modes, "contents": contents}


@pytest.fixture(scope="module")
def forbidden(hosts, gateway):
    """All encodings of all secrets."""
    password = gateway.url.partition(f"{USER}:")[2].partition("@")[0]
    login = base64.b64encode(f"{USER}:{password}".encode()).decode()
    found = {password, login.rstrip("=")}
    for host in hosts:
        found |= spellings(host.credentials.token) | spellings(host.credentials.hmac_secret)
    return found


def find_secrets(text, forbidden):
    """Return the secrets that ``text`` contains."""
    return [secret for secret in forbidden if secret in text]


def test_failures_occurred_at_debug_level(exposed, hosts, gateway):
    """Each host logged at DEBUG, and the proxy rejected it with a status."""
    assert gateway.rejected >= 3 * len(hosts)
    for host in hosts:
        log = host.output()
        assert "DEBUG" in log
        assert "407" in log
        assert "Z4J_TOKEN" in log
        assert "Traceback" not in log
    assert sum(len(text["reprs"]) for text in exposed["texts"]) > 1000
    assert any("407" in str(text["errors"]) for text in exposed["texts"])


def test_no_secret_in_reprs_and_errors(exposed, forbidden):
    """Reprs, stats, errors and their contexts contain no secret in any encoding."""
    for text in exposed["texts"]:
        for part in ("reprs", "figures", "errors"):
            assert find_secrets(str(text[part]), forbidden) == [], part


def test_no_secret_in_files(exposed, forbidden):
    """Logs and buffers contain no secret."""
    assert [path.name for path in exposed["contents"] if path.suffix == ".sqlite"]
    for path, content in exposed["contents"].items():
        assert find_secrets(content.decode("latin-1"), forbidden) == [], path


def test_no_secret_in_process_list(exposed, forbidden, hosts):
    """No command line contains a secret."""
    assert any("embedded.py" in line for line in exposed["lines"])
    assert find_secrets("\n".join(exposed["lines"]), forbidden) == []


def test_buffers_are_private(exposed, hosts):
    """The buffer's directory has mode 0700, and every file in it 0600."""
    assert len({path.suffix for path in exposed["modes"]} & {".sqlite", ".lock"}) == 2
    for path, mode in exposed["modes"].items():
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path
