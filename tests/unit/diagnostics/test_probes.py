"""Every wrong configuration is reported with cause and fix by the probe that is responsible."""

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
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.certificates import make
from tests.support.combined_peer import CombinedPeer
from tests.support.environment import set_connection
from tests.support.existing_agent import existing_event, existing_frame, make_existing_buffer
from tests.support.http_peer import Tunnel
from tests.support.listener import Listener, send_all
from tests.support.peer import SECRET, PeerSession
from z4j_bare import diagnostics
from z4j_bare.buffer import files
from z4j_bare.buffer.files import candidate_directories
from z4j_bare.diagnostics import host, network, result
from z4j_bare.errors import HostConfigurationError
from z4j_bare.install import resolve_config
from z4j_bare.settings import load_settings

OTHER_SECRET = "HxwdHBsaGRgXFhUUExIREA8ODQwLCgkIBwYFBAMCAQA="


@pytest.fixture
def brain(backend):
    """A scripted brain that accepts the agent."""
    scripted = CombinedPeer(backend)
    yield scripted
    scripted.stop()


@pytest.fixture
def run_checks(monkeypatch, tmp_path):
    """``run_checks(url, **settings)``: run every probe; returns the results by name."""

    def run(url, **variables):
        set_connection(monkeypatch, url, **variables)
        settings = load_settings()
        results = diagnostics.all_checks(resolve_config(settings), settings)
        return {result.name: result for result in results}

    return run


def only_failure(results):
    """Return the only failed result."""
    (failure,) = [each for each in results.values() if not each.ok]
    assert failure.fix
    assert failure.message == f"FAIL: {failure.text}: {failure.fix}"
    json.dumps(failure.details)
    return failure


def verdicts(results):
    return {name: each.verdict for name, each in results.items()}


def test_working_configuration_passes_all_probes(brain, run_checks):
    """Every probe passes, no hello is sent and no command is claimed."""
    brain.http.command("retry_task")
    results = run_checks(brain.url)
    assert set(verdicts(results).values()) == {"OK", "SKIP"}
    assert [name for name, each in results.items() if each.verdict == "SKIP"] == ["tls"]
    assert results["websocket"].details["remote_connection_verified"]
    assert [session.hello for session in brain.ws.sessions] == [None]
    assert len(brain.http.commands) == 1
    assert brain.http.errors == []
    assert [frame.payload.events for frame in brain.http.frames("event_batch")] == [[]]


def test_unknown_host_fails_dns(run_checks):
    """A host name that cannot be resolved is reported by the probe of DNS."""
    failure = only_failure(run_checks("https://nobody.invalid"))
    assert failure.name == "dns"
    assert "cannot resolve nobody.invalid" in failure.text
    assert "Z4J_BRAIN_URL" in failure.fix


def test_closed_port_fails_tcp(run_checks):
    """A closed port is reported by the probe of TCP, and the probes after it are skipped."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    results = run_checks(f"http://127.0.0.1:{port}")
    failure = only_failure(results)
    assert (failure.name, failure.text) == ("tcp", f"127.0.0.1:{port} refuses the connection")
    assert verdicts(results)["signature"] == "SKIP"
    assert "because tcp failed" in results["tls"].text


def test_port_without_answer_fails_tcp(run_checks, monkeypatch):
    """If the connection times out, the fix names a firewall."""

    def time_out(*_args, **_options):
        raise TimeoutError

    monkeypatch.setattr(network.socket, "create_connection", time_out)
    failure = network.probe_tcp("http://127.0.0.1:9")
    assert "does not answer within 5 s" in failure.text
    assert "firewall" in failure.fix


@pytest.mark.parametrize(
    ("days", "known", "cause", "fix"),
    [
        ((-9, -1), True, "has expired", "renew it"),
        ((1, 9), True, "is not valid yet", "clock"),
        ((-1, 90), False, "issued by an unknown authority", "Z4J_CA_BUNDLE"),
    ],
)
def test_invalid_certificate_fails_tls(backend, run_checks, tmp_path, days, known, cause, fix):
    """Expired, not yet valid and of an unknown authority are three causes with different fixes."""
    pem = make(tmp_path / "brain.pem", days)
    brain = CombinedPeer(backend, tls=server_context(pem))
    try:
        failure = only_failure(run_checks(brain.url, **({"ca_bundle": pem} if known else {})))
    finally:
        brain.stop()
    assert failure.name == "tls"
    assert cause in failure.text
    assert fix in failure.fix


@pytest.mark.parametrize(("last", "verdict"), [(90, "OK"), (5, "WARN")])
def test_certificate_that_expires_soon_is_warning(backend, run_checks, tmp_path, last, verdict):
    """The days until expiry are reported, with a warning below two weeks; TLS probes all pass."""
    pem = make(tmp_path / "brain.pem", (-1, last))
    brain = CombinedPeer(backend, tls=server_context(pem))
    try:
        results = run_checks(brain.url, ca_bundle=pem)
    finally:
        brain.stop()
    assert {name: each.text for name, each in results.items() if not each.ok} == {}
    assert (results["tls"].verdict, results["tls"].details["days_left"]) == (verdict, last - 1)
    assert results["signature"].verdict == "OK"


def test_certificate_without_expiry_date_passes_tls(backend, tmp_path):
    """If the certificate names no expiry date, the text says so."""
    brain = CombinedPeer(backend, tls=server_context(make(tmp_path / "brain.pem", (-1, 90))))
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE  # then Python returns no field of the certificate
    try:
        found = network.probe_tls(brain.url, context=unverified)
    finally:
        brain.stop()
    assert found.verdict == "OK"
    assert found.text.endswith(", the certificate names no expiry date")
    assert found.details["days_left"] is None


def test_https_to_plain_http_port_fails_tls(backend, run_checks):
    """If the port of an https address speaks plain http, the fix names the scheme."""
    listener = Listener(
        backend,
        lambda sock: send_all(backend, sock, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        name="plain",
    )
    try:
        failure = only_failure(run_checks(listener.url.replace("http:", "https:")))
    finally:
        listener.stop()
    assert failure.name == "tls"
    assert "scheme" in failure.fix


@pytest.mark.parametrize(("minutes", "direction"), [(5, "behind"), (-5, "ahead of")])
def test_clock_skew_fails_clock(brain, run_checks, backend, minutes, direction):
    """A clock that differs by five minutes is reported with direction and size."""
    date = formatdate(backend.wall() + 60 * minutes, usegmt=True)
    brain.http.answers["GET"] = [(200, {"Date": date}, b'{"status":"ok"}')]
    results = run_checks(brain.url)
    failure = only_failure(results)
    assert failure.name == "clock"
    assert direction in failure.text
    assert abs(abs(failure.details["skew_seconds"]) - 300) < 30
    assert "NTP" in failure.fix


def test_unknown_token_fails_token(brain, run_checks):
    """A token that the brain does not know is reported without printing the token."""
    failure = only_failure(run_checks(brain.url, token="swordfish"))
    assert failure.name == "token"
    assert "does not know the token" in failure.text
    assert "Z4J_TOKEN" in failure.fix
    assert "swordfish" not in str(failure)


def test_wrong_key_fails_signature(brain, run_checks):
    """With equal clocks, a rejected signature means a wrong key."""
    failure = only_failure(run_checks(brain.url, hmac_secret=OTHER_SECRET))
    assert failure.name == "signature"
    assert "the key is not this project's" in failure.text
    assert "Z4J_HMAC_SECRET" in failure.fix


def test_rejected_signature_with_clock_skew_names_clock(brain, run_checks, backend):
    """With different clocks, a rejected signature is attributed to the clock."""
    brain.http.answers["GET"] = [
        (200, {"Date": formatdate(backend.wall() + 300, usegmt=True)}, b'{"status":"ok"}')
    ]
    results = run_checks(brain.url, hmac_secret=OTHER_SECRET)
    assert "clocks differ" in results["signature"].text


def test_archived_project_fails_token(brain, run_checks):
    """An archived project is reported by its name."""
    error = {"error": "project_inactive", "message": "project is not active"}
    body = json.dumps({**error, "request_id": "r", "details": {}}).encode()
    brain.http.answers["GET"] = [(200, {}, b'{"status":"ok"}'), (403, {}, body)]
    failure = only_failure(run_checks(brain.url))
    assert (failure.name, failure.text) == ("token", "the project p is archived")


def test_server_that_answers_invalid_hello_fails_websocket(brain, run_checks, monkeypatch):
    """A server that answers a message, instead of closing the connection, is no brain."""

    def answer(session):
        session._read_message()
        session.send(b'{"status": "ok"}')
        session._read_message()

    monkeypatch.setattr(PeerSession, "_receive_frames", answer)
    failure = only_failure(run_checks(brain.url))
    assert failure.name == "websocket"
    assert "is not a brain" in failure.text
    assert "None" not in failure.message
    assert "Z4J_BRAIN_URL" in failure.fix


@pytest.mark.parametrize("status", [400, 403, 426, 502])
def test_proxy_that_blocks_upgrades_fails_websocket(brain, run_checks, status):
    """A proxy that blocks WebSocket is reported with its status, the headers and the setting."""
    brain.blocks = status
    failure = only_failure(run_checks(brain.url))
    assert (failure.name, failure.details["status"]) == ("websocket", status)
    assert f"HTTP {status}" in failure.text or "403" in str(failure.details)
    assert "Upgrade" in failure.fix
    assert "Z4J_TRANSPORT=longpoll" in failure.fix


def test_websocket_is_skipped_with_longpoll(brain, run_checks):
    """With Z4J_TRANSPORT=longpoll WebSocket is not probed."""
    brain.blocks = 403
    assert run_checks(brain.url, transport="longpoll")["websocket"].verdict == "SKIP"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_unwritable_home_fails_buffer_path(run_checks, brain, tmp_path, monkeypatch, number):
    """A home that is not writable is reported with the setting and the fallback directory."""
    open_file, home = files.open_file, tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(home)):
            raise OSError(number, os.strerror(number))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(files, "open_file", refuse)
    failure = only_failure(run_checks(brain.url))
    assert failure.name == "buffer_path"
    assert str(home) in failure.text
    assert os.strerror(number) in failure.text
    assert "Z4J_HOME" in failure.fix
    assert failure.details["fallback"] == str(candidate_directories(home / "x")[1])


def test_home_of_another_user_fails_buffer_path(run_checks, brain, tmp_path, monkeypatch):
    """A home of another user is reported with both uids."""
    (tmp_path / "home").mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    failure = only_failure(run_checks(brain.url))
    assert failure.name == "buffer_path"
    assert f"belongs to uid {me}" in failure.text
    assert f"uid {me + 1}" in failure.fix


@pytest.mark.parametrize(("patched", "missing"), [("socket", "threads"), ("threading", "sockets")])
def test_partial_patch_fails_concurrency(monkeypatch, patched, missing):
    """A partially patched process is reported with what is missing and the call that fixes it."""
    fake = SimpleNamespace(is_module_patched=lambda name: name == patched)
    module = import_module("z4j_bare.concurrency.detect")  # the package has a function of that name
    monkeypatch.setattr(module, "sys", SimpleNamespace(modules={"gevent.monkey": fake}))
    failure = diagnostics.probe_concurrency()
    assert not failure.ok
    assert f"but not {missing}" in failure.text
    assert "full monkey patch" in failure.fix


def test_concurrency_of_this_process_passes(mode):
    """The present mode passes, and a backend that the process is not patched for fails."""
    assert diagnostics.probe_concurrency().details["chosen"] == mode
    other = "eventlet" if mode == "gevent" else "gevent"
    assert not diagnostics.probe_concurrency(other).ok


def test_other_package_fails_package(tmp_path):
    """The asyncio agent's package, two releases side by side and no package at all fail."""
    assert diagnostics.probe_package().ok
    green, asyncio = (make_dist(tmp_path, number) for number in ("1.13.0+green.1", "1.14.0"))
    assert host.probe_package([green]).ok
    assert "asyncio agent" in host.probe_package([asyncio]).text
    assert "side by side" in host.probe_package([green, asyncio]).text
    assert not host.probe_package([]).ok


def test_nearly_full_disk_is_warning(tmp_path, monkeypatch):
    """A disk with little free space is a warning."""
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
        ((407, {}, b""), "requires a login"),
        ((502, {}, b""), "a proxy answers"),
        ((500, {}, b""), "HTTP 500"),
        ((200, {}, b"<html>Welcome to Hotel WiFi"), "is not answered by a brain"),
        ((200, {}, b"[]"), "is not answered by a brain"),
    ],
)
def test_answer_of_other_server_fails_http(brain, run_checks, answer, cause):
    """A redirect, a login, a proxy's error and another server are different causes."""
    brain.http.answers["GET"] = [answer]
    failure = only_failure(run_checks(brain.url))
    assert failure.name == "http"
    assert cause in failure.text


def test_proxy_is_probed_instead_of_brain(backend, brain, run_checks, monkeypatch, tmp_path):
    """With a proxy in the environment DNS and TCP probe the proxy, and TLS passes through it."""
    pem = make(tmp_path / "brain.pem", (-1, 90))
    secure, tunnel = CombinedPeer(backend, tls=server_context(pem)), Tunnel(backend)
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:hunter2@127.0.0.1:{tunnel.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    try:
        results = run_checks(secure.url, ca_bundle=pem)
    finally:
        tunnel.stop()
        secure.stop()
    assert {name: each.text for name, each in results.items() if not each.ok} == {}
    assert results["tcp"].details["port"] == tunnel.port
    assert "through the proxy" in results["dns"].text
    assert len(tunnel.heads) >= 4
    assert "hunter2" not in str(results)


@pytest.mark.parametrize("url", ["http://", "nonsense", "http://x:y", "http://[::1"])
def test_invalid_brain_url_is_configuration_error(url):
    """An invalid address is a configuration error that names the setting."""
    with pytest.raises(HostConfigurationError, match="Z4J_BRAIN_URL"):
        network.parse_target(url)


def test_functions_that_adapters_call(brain, run_checks):
    """``probe_websocket`` has the details that z4j-django reads; ``run_all`` stops at a failure."""
    run_checks(brain.url)
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
    brain.http.stop()
    brain.ws.stop()
    assert [each.ok for each in diagnostics.run_all(config)] == [True, True, True, True, False]
    insecure = config.model_copy(update={"brain_url": "http://brain.example"})
    assert "Z4J_BRAIN_URL" in diagnostics.probe_websocket(insecure).message


def test_websocket_probe_names_rejected_token(brain, run_checks):
    """The probe of WebSocket alone reports a rejected token."""
    run_checks(brain.url)
    brain.ws.token = "another"
    found = diagnostics.probe_websocket(resolve_config(load_settings()))
    assert (found.ok, found.details["code"], found.details["remote_authentication_verified"]) == (
        False,
        4401,
        False,
    )
    assert "Z4J_TOKEN" in found.fix


def test_results_have_text_and_fix():
    """Text, fix and ``ok`` follow from the verdict."""
    for probe_result in (
        result.passed("n", "t"),
        result.skipped("n", "t"),
        result.warned("n", "t", "f"),
        result.failed("n", "t", "f"),
    ):
        assert probe_result.text == "t"
        assert probe_result.fix == ("f" if probe_result.verdict in ("WARN", "FAIL") else "")
        assert probe_result.ok == (probe_result.verdict != "FAIL")


def server_context(pem):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def make_dist(folder, number):
    info = folder / f"z4j_bare-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: z4j-bare\nVersion: {number}\n")
    return Distribution.at(info)


def test_doctor_reports_app_that_patches_partially(mode, tmp_path):
    """``doctor --app`` in another process finds what a real application has not patched."""
    library = "eventlet" if mode == "eventlet" else "gevent"
    patches = {
        "gevent": "from gevent import monkey; monkey.patch_all(thread=False)",
        "eventlet": "import eventlet; eventlet.monkey_patch(thread=False)",
    }
    (tmp_path / "partial_app.py").write_text(f"{patches[library]}\napp = object()\n")
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
        "partial_app:app",
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


def test_buffers_of_existing_agent_are_reported(run_checks, brain, monkeypatch, tmp_path):
    """Events that the existing agent left are a warning; without them there is no such probe."""
    monkeypatch.setattr(files, "candidate_directories", lambda path: [Path(path).parent])
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "home"))
    assert "leftovers" not in run_checks(brain.url)
    rows = [("event_batch", existing_frame(existing_event(1)))]
    path = make_existing_buffer(tmp_path / "home", SECRET, rows)
    found = run_checks(brain.url)["leftovers"]
    assert (found.verdict, found.ok) == ("WARN", True)
    assert str(path) in found.text
    assert "1 unsent event frames" in found.text
    assert "z4j-bare buffer flush" in found.fix
    path.unlink()
    make_existing_buffer(tmp_path / "home", b"x" * 32, rows)
    found = run_checks(brain.url)["leftovers"]
    assert "another key" in found.text
    assert "z4j-bare buffer drop" in found.fix
