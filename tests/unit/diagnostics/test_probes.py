"""Every broken set-up is told by its cause and its fix, by the probe whose business it is."""

import errno
import json
import os
import socket
import ssl
import subprocess
import sys
from email.utils import formatdate
from importlib import import_module
from importlib.metadata import Distribution
from types import SimpleNamespace

import pytest

from tests.support.certificates import make
from tests.support.front import Front
from tests.support.http_peer import Tunnel
from tests.support.listener import Listener, push
from tests.support.peer import SECRET_TEXT, TOKEN
from z4j_bare import diagnostics
from z4j_bare.buffer import lock
from z4j_bare.buffer.files import candidate_directories
from z4j_bare.diagnostics import host, network, result
from z4j_bare.errors import HostConfigurationError
from z4j_bare.install import resolve_config
from z4j_bare.settings import load_settings

OTHER_SECRET = "HxwdHBsaGRgXFhUUExIREA8ODQwLCgkIBwYFBAMCAQA="


@pytest.fixture
def front(backend):
    """A scripted brain that is in order."""
    made = Front(backend)
    yield made
    made.stop()


@pytest.fixture
def patient(monkeypatch, tmp_path):
    """``patient(url, **settings)``: what the doctor says, as results by name."""

    def examine(url, **settings):
        for name, value in {
            "brain_url": url,
            "project_id": "p",
            "token": TOKEN,
            "hmac_secret": SECRET_TEXT,
            **settings,
        }.items():
            monkeypatch.setenv(f"Z4J_{name.upper()}", str(value))
        found = load_settings()
        return {each.name: each for each in diagnostics.examine(resolve_config(found), found)}

    return examine


def only_failure(results):
    """The one result that is bad; what rests on it is skipped."""
    (bad,) = [each for each in results.values() if not each.ok]
    assert bad.fix
    assert bad.message == f"FAIL: {bad.text}: {bad.fix}"
    json.dumps(bad.details)
    return bad


def verdicts(results):
    return {name: each.verdict for name, each in results.items()}


def test_all_is_well(front, patient):
    """A brain in order passes every probe, and neither sees a hello nor loses a command to the doctor."""
    front.http.command("retry_task")
    results = patient(front.url)
    assert set(verdicts(results).values()) == {"OK", "SKIP"}
    assert [name for name, each in results.items() if each.verdict == "SKIP"] == ["tls"]
    assert results["websocket"].details["remote_connection_verified"]
    assert [session.hello for session in front.ws.sessions] == [None]
    assert len(front.http.commands) == 1
    assert front.http.mishaps == []
    assert [frame.payload.events for frame in front.http.frames("event_batch")] == [[]]


def test_wrong_host(patient):
    """A name that nobody knows is the name servers' answer, and names Z4J_BRAIN_URL."""
    bad = only_failure(patient("https://nobody.invalid"))
    assert bad.name == "dns"
    assert "nobody.invalid is not a known name" in bad.text
    assert "Z4J_BRAIN_URL" in bad.fix


def test_closed_port(patient):
    """A port where nobody listens is told as that, and nothing behind it is tried."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    results = patient(f"http://127.0.0.1:{port}")
    bad = only_failure(results)
    assert (bad.name, bad.text) == ("tcp", f"nobody listens on 127.0.0.1:{port}")
    assert verdicts(results)["signature"] == "SKIP"
    assert "because tcp failed" in results["tls"].text


def test_silent_port(patient, monkeypatch):
    """A firewall that swallows everything is told from a port that refuses."""

    def nothing(*_args, **_options):
        raise TimeoutError

    monkeypatch.setattr(network.socket, "create_connection", nothing)
    bad = network.probe_tcp("http://127.0.0.1:9")
    assert "does not answer within 5 s" in bad.text
    assert "firewall" in bad.fix


@pytest.mark.parametrize(
    ("days", "known", "cause", "fix"),
    [
        ((-9, -1), True, "has expired", "renew it"),
        ((1, 9), True, "is not valid yet", "clock"),
        ((-1, 90), False, "authority unknown to this host", "Z4J_CA_BUNDLE"),
    ],
)
def test_bad_certificates(backend, patient, tmp_path, days, known, cause, fix):
    """An expired certificate, one of the future and one of an unknown authority are three different things."""
    pem = make(tmp_path / "brain.pem", days)
    front = Front(backend, tls=server(pem))
    try:
        bad = only_failure(patient(front.url, **({"ca_bundle": pem} if known else {})))
    finally:
        front.stop()
    assert bad.name == "tls"
    assert cause in bad.text
    assert fix in bad.fix


@pytest.mark.parametrize(("last", "verdict"), [(90, "OK"), (5, "WARN")])
def test_certificate_expiry(backend, patient, tmp_path, last, verdict):
    """A good certificate is told with the days it has left, with a warning when they are few; the rest goes over TLS."""
    pem = make(tmp_path / "brain.pem", (-1, last))
    front = Front(backend, tls=server(pem))
    try:
        results = patient(front.url, ca_bundle=pem)
    finally:
        front.stop()
    assert {name: each.text for name, each in results.items() if not each.ok} == {}
    assert (results["tls"].verdict, results["tls"].details["days_left"]) == (verdict, last - 1)
    assert results["signature"].verdict == "OK"


def test_no_tls_where_tls_is_expected(backend, patient):
    """An https address to a port that speaks http names the scheme."""
    door = Listener(
        backend, lambda sock: push(backend, sock, b"HTTP/1.1 400 Bad Request\r\n\r\n"), name="plain"
    )
    try:
        bad = only_failure(patient(door.url.replace("http:", "https:")))
    finally:
        door.stop()
    assert bad.name == "tls"
    assert "scheme" in bad.fix


@pytest.mark.parametrize(("minutes", "way"), [(5, "behind"), (-5, "ahead of")])
def test_clock(front, patient, backend, minutes, way):
    """A clock that is five minutes off is told before anybody suspects the key."""
    late = formatdate(backend.wall() + 60 * minutes, usegmt=True)
    front.http.answers["GET"] = [(200, {"Date": late}, b'{"status":"ok"}')]
    results = patient(front.url)
    bad = only_failure(results)
    assert bad.name == "clock"
    assert way in bad.text
    assert abs(abs(bad.details["skew_seconds"]) - 300) < 30
    assert "NTP" in bad.fix


def test_bad_token(front, patient):
    """A token that the brain does not know is told once, as that."""
    bad = only_failure(patient(front.url, token="swordfish"))
    assert bad.name == "token"
    assert "does not know the token" in bad.text
    assert "Z4J_TOKEN" in bad.fix
    assert "swordfish" not in str(bad)


def test_bad_secret(front, patient):
    """A key that is not the project's is what the refused signature means when the clocks agree."""
    bad = only_failure(patient(front.url, hmac_secret=OTHER_SECRET))
    assert bad.name == "signature"
    assert "the key is another one" in bad.text
    assert "Z4J_HMAC_SECRET" in bad.fix


def test_refused_signature_with_a_skewed_clock(front, patient, backend):
    """With clocks far apart the key is not blamed."""
    front.http.answers["GET"] = [
        (200, {"Date": formatdate(backend.wall() + 300, usegmt=True)}, b'{"status":"ok"}')
    ]
    results = patient(front.url, hmac_secret=OTHER_SECRET)
    assert "clocks differ" in results["signature"].text


def test_archived_project(front, patient):
    """An archived project is named."""
    said = b'{"error":"project_inactive","message":"project is not active","request_id":"r","details":{}}'
    front.http.answers["GET"] = [(200, {}, b'{"status":"ok"}'), (403, {}, said)]
    bad = only_failure(patient(front.url))
    assert (bad.name, bad.text) == ("token", "the project p is archived")


@pytest.mark.parametrize("status", [400, 403, 426, 502])
def test_proxy_that_blocks_upgrades(front, patient, status):
    """A proxy that lets HTTP pass and no WebSocket is told by what it answers, with the header and the setting that help."""
    front.blocks = status
    bad = only_failure(patient(front.url))
    assert (bad.name, bad.details["status"]) == ("websocket", status)
    assert f"HTTP {status}" in bad.text or "403" in str(bad.details)
    assert "Upgrade" in bad.fix
    assert "Z4J_TRANSPORT=longpoll" in bad.fix


def test_longpoll_by_choice(front, patient):
    """With Z4J_TRANSPORT=longpoll nobody misses WebSocket."""
    front.blocks = 403
    assert patient(front.url, transport="longpoll")["websocket"].verdict == "SKIP"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_read_only_home(patient, front, tmp_path, monkeypatch, number):
    """A home that cannot be written names itself, the user and Z4J_HOME, and where the buffer would lie instead."""
    really, home = lock.open_file, tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(home)):
            raise OSError(number, os.strerror(number))
        return really(path, *args, **kwargs)

    monkeypatch.setattr(lock, "open_file", refuse)
    bad = only_failure(patient(front.url))
    assert bad.name == "buffer_path"
    assert str(home) in bad.text
    assert os.strerror(number) in bad.text
    assert "Z4J_HOME" in bad.fix
    assert bad.details["fallback"] == str(candidate_directories(home / "x")[1])


def test_foreign_home(patient, front, tmp_path, monkeypatch):
    """A home that belongs to another user says to whom, and who we are."""
    (tmp_path / "home").mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    bad = only_failure(patient(front.url))
    assert bad.name == "buffer_path"
    assert f"belongs to uid {me}" in bad.text
    assert f"uid {me + 1}" in bad.fix


@pytest.mark.parametrize(("patched", "left"), [("socket", "threads"), ("threading", "sockets")])
def test_partial_patch(monkeypatch, patched, left):
    """A process that is patched by half is told what is missing, and by which call it is mended."""
    fake = SimpleNamespace(is_module_patched=lambda name: name == patched)
    module = import_module("z4j_bare.concurrency.detect")  # the package has a function of that name
    monkeypatch.setattr(module, "sys", SimpleNamespace(modules={"gevent.monkey": fake}))
    bad = diagnostics.probe_concurrency()
    assert not bad.ok
    assert f"but not {left}" in bad.text
    assert "full monkey patch" in bad.fix


def test_concurrency_as_it_is(mode):
    """The suite's own process is in order, and a wish that it cannot carry is refused."""
    assert diagnostics.probe_concurrency().details["chosen"] == mode
    wish = "eventlet" if mode == "gevent" else "gevent"
    assert not diagnostics.probe_concurrency(wish).ok


def test_whose_package(tmp_path):
    """Ours passes; the asyncio agent's, two side by side, or none at all do not."""
    assert diagnostics.probe_package().ok
    ours, theirs = (dist(tmp_path, number) for number in ("1.13.0+green.1", "1.14.0"))
    assert host.probe_package([ours]).ok
    assert "asyncio agent" in host.probe_package([theirs]).text
    assert "side by side" in host.probe_package([ours, theirs]).text
    assert not host.probe_package([]).ok


def test_little_room(tmp_path, monkeypatch):
    """A disk that is nearly full is a warning."""
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _path: SimpleNamespace(free=5 << 20))
    found = diagnostics.probe_buffer_path(tmp_path / "home" / "buffer.sqlite")
    assert (found.ok, found.verdict) == (True, "WARN")
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (
            (302, {"Location": "https://login.example/\x1b[2J"}, b""),
            "redirects to https://login.example/?[2J",
        ),
        ((404, {}, b""), "no health route"),
        ((407, {}, b""), "wants a login"),
        ((502, {}, b""), "a proxy answers"),
        ((500, {}, b""), "HTTP 500"),
        ((200, {}, b"<html>Welcome to Hotel WiFi"), "is no brain"),
        ((200, {}, b"[]"), "is no brain"),
    ],
)
def test_unhealthy(front, patient, answer, cause):
    """What stands in the brain's place, or in front of it, is told apart."""
    front.http.answers["GET"] = [answer]
    bad = only_failure(patient(front.url))
    assert bad.name == "http"
    assert cause in bad.text


def test_through_a_proxy(backend, front, patient, monkeypatch, tmp_path):
    """With a proxy in the environment the proxy is what is looked up and connected to, and TLS goes through it."""
    pem = make(tmp_path / "brain.pem", (-1, 90))
    secure, tunnel = Front(backend, tls=server(pem)), Tunnel(backend)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:hunter2@127.0.0.1:{tunnel.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    try:
        results = patient(secure.url, ca_bundle=pem)
    finally:
        tunnel.stop()
        secure.stop()
    assert {name: each.text for name, each in results.items() if not each.ok} == {}
    assert results["tcp"].details["port"] == tunnel.port
    assert "through the proxy" in results["dns"].text
    assert len(tunnel.heads) >= 4
    assert "hunter2" not in str(results)


@pytest.mark.parametrize("url", ["http://", "nonsense", "http://x:y", "http://[::1"])
def test_addresses_that_are_none(url):
    """An address that cannot be one is a configuration error that names the setting."""
    with pytest.raises(HostConfigurationError, match="Z4J_BRAIN_URL"):
        network.target_of(url)


def test_the_adapters_names(front, patient, monkeypatch):
    """The probes that z4j-django calls one by one, and ``run_all``, which stops at the first failure."""
    patient(front.url)
    config = resolve_config(load_settings())
    assert diagnostics.probe_websocket(config).details == {
        "remote_connection_verified": True,
        "remote_authentication_verified": True,
    }
    names = [each.name for each in diagnostics.run_all(config)]
    assert names == [
        "buffer_path",
        "dns",
        "tcp",
        "tls",
        "http",
        "clock",
        "token",
        "websocket",
        "signature",
    ]
    front.http.stop()
    front.ws.stop()
    assert [each.ok for each in diagnostics.run_all(config)] == [True, True, True, True, False]
    refused = config.model_copy(update={"brain_url": "http://brain.example"})
    assert "Z4J_BRAIN_URL" in diagnostics.probe_websocket(refused).message


def test_a_websocket_that_is_refused(front, patient):
    """Alone, the WebSocket probe says when the token is what is wrong."""
    patient(front.url)
    front.ws.token = "another"
    found = diagnostics.probe_websocket(resolve_config(load_settings()))
    assert (found.ok, found.details["code"], found.details["remote_authentication_verified"]) == (
        False,
        4401,
        False,
    )
    assert "Z4J_TOKEN" in found.fix


def test_results_are_plain():
    """A result can be told as a line and as JSON, whatever its verdict."""
    for made in (
        result.passed("n", "t"),
        result.skipped("n", "t"),
        result.warned("n", "t", "f"),
        result.failed("n", "t", "f"),
    ):
        assert made.text == "t"
        assert made.fix == ("f" if made.verdict in ("WARN", "FAIL") else "")
        assert made.ok == (made.verdict != "FAIL")


def server(pem):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def dist(folder, number):
    info = folder / f"z4j_bare-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: z4j-bare\nVersion: {number}\n")
    return Distribution.at(info)


def test_an_application_that_patches_by_half(mode, tmp_path):
    """``doctor --app`` imports it, and finds what it has left out: the real thing, in a process of its own."""
    library = "eventlet" if mode == "eventlet" else "gevent"
    patches = {
        "gevent": "from gevent import monkey; monkey.patch_all(thread=False)",
        "eventlet": "import eventlet; eventlet.monkey_patch(thread=False)",
    }
    (tmp_path / "half.py").write_text(f"{patches[library]}\napp = object()\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONWARNINGS": "ignore",
    }
    command = [
        sys.executable,
        "-m",
        "z4j_bare",
        "doctor",
        "--json",
        "--app",
        "half:app",
        "--project-id",
        "p",
        "--token",
        "t",
    ]
    done = subprocess.run(
        [*command, "--brain-url", "http://127.0.0.1:9"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    probes = {probe["name"]: probe for probe in json.loads(done.stdout)["probes"]}
    assert (
        probes["concurrency"]["details"]["cause"]
        == f"{library} has patched sockets but not threads"
    )
    assert library in probes["concurrency"]["details"]["fix"]
