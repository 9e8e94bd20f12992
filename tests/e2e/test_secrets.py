"""After a day with everything that can go wrong, at DEBUG: no secret stands anywhere but in the process's environment."""

import base64
import secrets
import socket
import stat
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.e2e_host import MODES, PATIENCE, Host
from z4j_bare.demo.brain import Brain
from z4j_bare.demo.process import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

USER = "worker"


class Gateway:
    """A forward proxy that knows CONNECT and one password; behind it TLS ends, and the brain's port begins.

    ``mood`` is what it does to those who come: ``well``, or answer ``407``, ``502``, or ``hang up``.
    """

    def __init__(self, port, tls, password):
        self.mood = "well"
        self.served = 0
        self.refused = 0
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
        """Stop listening and hang up on everybody."""
        for sock in (self._listener, *self._socks):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def hang_up(self):
        """Break the lines that stand."""
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
            mood = self.mood if self._pass in head.decode() else "407"
            if mood == "well":
                self.served += 1
                sock.sendall(b"HTTP/1.1 200 Established\r\n\r\n")
                self._join(sock)
            else:
                self.refused += 1
                if mood != "hang up":
                    sock.sendall(
                        f"HTTP/1.1 {mood} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                    )

    def _join(self, sock):
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
    """A brain that lets itself be called by another name."""
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
    """A host in each mode and over each transport, all agents of one project."""
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
                    "HURRY": "1",
                    **dict.fromkeys(
                        ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"), gateway.url
                    ),
                }
                made.append(stack.enter_context(Host(mode, agent, home, **variables)))
        for host in made:
            host.wait_installed()
        yield made


def spellings(secret):
    """The forms in which a secret could show."""
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
    """The process list, as anybody on the machine may read it."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield (process / "cmdline").read_bytes().decode(errors="replace")


def files_of(home):
    return [path for path in home.rglob("*") if path.is_file()]


def failed_with(answer, host):
    error = host.ask("stats")["last_error"]
    return bool(error) and answer in error


def run_the_day(hosts, gateway, brain):
    """Sessions, events, every failure of the proxy, a token that is revoked; the brain restarts in between."""
    each = lambda condition, what: [  # noqa: E731
        until(lambda host=host: condition(host), what, timeout=PATIENCE) for host in hosts
    ]
    each(lambda host: host.ask("stats")["sessions"], "sessions")
    texts = []
    for mood, answer in (("407", "407"), ("502", "502"), ("hang up", "")):
        for host in hosts:
            host.produce("day", 10, 0.1)
        gateway.mood = mood
        gateway.hang_up()
        # The line that broke is the first failure, and tells nothing of the proxy yet.
        each(partial(failed_with, answer), f"a failure {answer}")
        texts += [host.ask("expose") for host in hosts]
        gateway.mood = "well"
        each(Host.settled, "acks")
    texts += [host.ask("expose") for host in hosts]
    for host in hosts:
        assert host.delivered(brain, "day")
        brain.revoke_agent(host.credentials.project, host.credentials.agent_id)
    each(lambda host: "Z4J_TOKEN" in host.ask("stats")["last_error"], "a refusal")
    return texts + [host.ask("expose") for host in hosts]


@pytest.fixture(scope="module")
def day(hosts, gateway, brain):
    """What the day left: texts of the living, the process list, and where the files are."""
    texts = run_the_day(hosts, gateway, brain)
    lines = list(command_lines())
    modes = {
        path: path.stat().st_mode for host in hosts for path in (host.cwd / "agent").rglob("*")
    }
    contents = {path: path.read_bytes() for host in hosts for path in files_of(host.cwd)}
    for host in hosts:
        assert host.leave() == 0
    contents |= {path: path.read_bytes() for host in hosts for path in files_of(host.cwd)}
    return {"texts": texts, "lines": lines, "modes": modes, "contents": contents}


@pytest.fixture(scope="module")
def forbidden(hosts, gateway):
    """Everything that must not be found."""
    password = gateway.url.partition(f"{USER}:")[2].partition("@")[0]
    login = base64.b64encode(f"{USER}:{password}".encode()).decode()
    found = {password, login.rstrip("=")}
    for host in hosts:
        found |= spellings(host.credentials.token) | spellings(host.credentials.hmac_secret)
    return found


def told(text, forbidden):
    return [secret for secret in forbidden if secret in text]


def test_the_day_was_full(day, hosts, gateway):
    """Each host logged at DEBUG, was refused by the proxy, and named the proxy's answer: there was something to find."""
    assert gateway.refused >= 3 * len(hosts)
    for host in hosts:
        log = host.output()
        assert "DEBUG" in log
        assert "407" in log
        assert "Z4J_TOKEN" in log
        assert "Traceback" not in log
    assert sum(len(text["reprs"]) for text in day["texts"]) > 1000
    assert any("407" in str(text["errors"]) for text in day["texts"])


def test_no_secret_in_what_is_said(day, forbidden):
    """Neither reprs, figures, errors nor their contexts hold a secret in any spelling."""
    for text in day["texts"]:
        for part in ("reprs", "figures", "errors"):
            assert told(str(text[part]), forbidden) == [], part


def test_no_secret_in_a_file(day, forbidden):
    """Neither logs nor buffers, whoever may read them."""
    assert [path.name for path in day["contents"] if path.suffix == ".sqlite"]
    for path, content in day["contents"].items():
        assert told(content.decode("latin-1"), forbidden) == [], path


def test_no_secret_in_the_process_list(day, forbidden, hosts):
    """No command line holds one."""
    assert any("embedded.py" in line for line in day["lines"])
    assert told("\n".join(day["lines"]), forbidden) == []


def test_buffers_are_private(day, hosts):
    """The buffer's directory is 0700 and every file in it 0600; its parent was made by others."""
    assert len({path.suffix for path in day["modes"]} & {".sqlite", ".lock"}) == 2
    for path, mode in day["modes"].items():
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path
