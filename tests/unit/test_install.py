"""install_agent and the runtime's lifecycle: what is started where, and what a wrong setting says."""

import subprocess
import sys

import pytest
from z4j_core.errors import ConfigError

from tests.support.peer import SECRET_TEXT
from z4j_bare import AgentRuntime, BareFrameworkAdapter, RuntimeState, install, install_agent
from z4j_bare import _process_singleton as singleton
from z4j_bare import process as hosting
from z4j_bare.errors import HostConfigurationError


class Engine:
    name = "stub"
    worker_hostname = None

    def capabilities(self):
        return {"retry_task"}


class Consumer:
    hostname = "w1@host"


GIVEN = {
    "brain_url": "http://127.0.0.1:9",
    "token": "tok",
    "project_id": "demo",
    "hmac_secret": SECRET_TEXT,
}


@pytest.fixture(autouse=True)
def free_process():
    """No runtime of another test holds the process, and none of this one is left behind."""
    singleton.clear_runtime()
    yield
    left = singleton.current_runtime()
    if left is not None:
        left.stop(timeout=2)
    singleton.clear_runtime()


@pytest.fixture
def argv(monkeypatch):
    return lambda *words: monkeypatch.setattr(sys, "argv", list(words))


def test_starts_now_in_an_ordinary_process():
    """Outside Celery the agent runs as soon as install_agent returns, and has the process."""
    engine = Engine()
    runtime = install_agent(engines=[engine], **GIVEN)
    assert runtime.state is RuntimeState.RUNNING
    assert (singleton.current_runtime(), singleton.current_owner()) == (runtime, "install_agent")
    assert runtime.engines == {"stub": engine}
    assert runtime.config.project_id == "demo"
    assert isinstance(runtime.framework, BareFrameworkAdapter)


def test_the_first_one_wins():
    """A second install_agent returns the first runtime and starts nothing."""
    first = install_agent(engines=[Engine()], **GIVEN)
    assert install_agent(engines=[Engine()], **GIVEN) is first


def test_a_stopped_one_makes_room():
    """After stop() the next install_agent gets the process."""
    first = install_agent(engines=[Engine()], **GIVEN)
    first.stop(timeout=2)
    second = install_agent(engines=[Engine()], **GIVEN)
    assert second is not first
    assert second.state is RuntimeState.RUNNING


def test_autostart_off():
    """With autostart off everything is ready and nothing runs until start()."""
    runtime = install_agent(engines=[Engine()], autostart=False, **GIVEN)
    assert runtime.state is RuntimeState.STOPPED
    assert runtime.stats() == {"state": "stopped"}
    assert (runtime.buffer_size(), runtime.supervisor_state()["session_id"]) == (0, None)
    runtime.start()
    runtime.start()
    assert runtime.state is RuntimeState.RUNNING


def test_before_start_nothing_hurts():
    """Every public call is harmless on a runtime that never ran."""
    runtime = install_agent(engines=[Engine()], autostart=False, **GIVEN)
    runtime.record_event(object())
    runtime.request_reconnect()
    runtime.reinit_after_fork()
    runtime.stop()
    assert runtime.state is RuntimeState.STOPPED


@pytest.mark.parametrize("given", [BareFrameworkAdapter, "instance", None])
def test_frameworks(given):
    """A framework adapter is given as a class or as an instance, or is the plain one."""
    config = install_agent(engines=[Engine()], autostart=False, **GIVEN).config
    singleton.clear_runtime()
    instance = BareFrameworkAdapter(config)
    runtime = install_agent(
        engines=[Engine()],
        autostart=False,
        framework=instance if given == "instance" else given,
        **GIVEN,
    )
    assert isinstance(runtime.framework, BareFrameworkAdapter)
    assert given != "instance" or runtime.framework is instance


def test_settings_come_from_the_environment(monkeypatch):
    """What is not given as a keyword comes from Z4J_*."""
    for name, value in (
        ("BRAIN_URL", GIVEN["brain_url"]),
        ("TOKEN", "tok"),
        ("PROJECT_ID", "from-env"),
        ("HMAC_SECRET", SECRET_TEXT),
    ):
        monkeypatch.setenv(f"Z4J_{name}", value)
    runtime = install_agent(engines=[Engine()])
    assert runtime.state is RuntimeState.RUNNING
    assert runtime.config.project_id == "from-env"


def test_the_token_file_is_enough(tmp_path):
    """With token_file no token need be given."""
    path = tmp_path / "token"
    path.write_text("tok\n")
    given = {**GIVEN, "token": None, "token_file": path}
    assert install_agent(engines=[Engine()], **given).state is RuntimeState.RUNNING


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"engines": []}, ConfigError, "at least one engine"),
        ({"brain_url": None}, ConfigError, "brain_url"),
        ({"token": None}, ConfigError, "token"),
        ({"project_id": None}, ConfigError, "project_id"),
        ({"hmac_secret": None}, HostConfigurationError, "Z4J_HMAC_SECRET is missing"),
        ({"hmac_secret": "spaces are not base64 !!"}, RuntimeError, "Z4J_HMAC_SECRET"),
        ({"hmac_secret": "c2hvcnQ="}, RuntimeError, "decodes to 5 bytes"),
        ({"brain_url": "http://brain.example.com"}, HostConfigurationError, "Z4J_BRAIN_URL"),
        (
            {"brain_url": "nonsense"},
            HostConfigurationError,
            "Z4J_BRAIN_URL='nonsense': Input should be a valid URL",
        ),
        (
            {"max_payload_bytes": 3},
            HostConfigurationError,
            "Z4J_MAX_PAYLOAD_BYTES=3: Input should be greater",
        ),
        ({"tags": "x", "agent_name": "y" * 65}, HostConfigurationError, "Z4J_TAGS='x'"),
        ({"token": 3}, HostConfigurationError, "Z4J_TOKEN: Input should be a valid string"),
        (
            {"redaction_extra_key_patterns": ["("]},
            HostConfigurationError,
            "Z4J_REDACTION_EXTRA_KEY_PATTERNS: ",
        ),
        (
            {"redaction_extra_value_patterns": ["x["]},
            HostConfigurationError,
            "Z4J_REDACTION_EXTRA_VALUE_PATTERNS: ",
        ),
        ({"concurrency": "asyncio"}, HostConfigurationError, "Z4J_CONCURRENCY"),
    ],
)
def test_wrong_settings_name_themselves(changes, kind, said):
    """What is missing or wrong raises, names the setting, quotes no secret, and leaves the process free."""
    with pytest.raises(kind) as caught:
        install_agent(**{"engines": [Engine()], **GIVEN, **changes})
    text = f"{caught.value} {getattr(caught.value, 'details', '')}"
    assert said in text
    assert "\n" not in text
    assert SECRET_TEXT not in text
    assert str(changes.get("hmac_secret")) not in str(caught.value)
    assert singleton.current_runtime() is None


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("Z4J_BUFFER_MAX_EVENTS", "many", "Z4J_BUFFER_MAX_EVENTS must be an integer"),
        ("Z4J_HEARTBEAT_SECONDS", "0", "Z4J_HEARTBEAT_SECONDS=0: "),
        ("Z4J_TRANSPORT", "pigeon", "Z4J_TRANSPORT='pigeon': "),
    ],
)
def test_wrong_variables_name_themselves(monkeypatch, variable, text, said):
    """What z4j_core finds wrong with a variable is one line of ours, and names the variable."""
    monkeypatch.setenv(variable, text)
    with pytest.raises(HostConfigurationError, match=f"^{said}") as caught:
        install_agent(engines=[Engine()], **GIVEN)
    assert "\n" not in str(caught.value)


def test_bad_secret_files(tmp_path):
    """A key file that is wrong is named by its own variable, not by that of the value it stands for."""
    path = tmp_path / "key"
    path.write_text("c2hvcnQ=")
    with pytest.raises(HostConfigurationError, match="Z4J_HMAC_SECRET_FILE decodes to 5 bytes"):
        install_agent(engines=[Engine()], hmac_secret_file=path, **GIVEN)
    path.write_text("")
    with pytest.raises(HostConfigurationError, match="the file is empty"):
        install_agent(engines=[Engine()], hmac_secret_file=path, **GIVEN)


def test_bad_certificates(tmp_path):
    """A certificate file that is none fails at start and names its variable, instead of failing every connection."""
    path = tmp_path / "ca.pem"
    path.write_text("not a certificate")
    given = {**GIVEN, "brain_url": "https://brain.example.com"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("Z4J_CA_BUNDLE", str(path))
        with pytest.raises(HostConfigurationError, match="Z4J_CA_BUNDLE"):
            install_agent(engines=[Engine()], **given)
        patch.delenv("Z4J_CA_BUNDLE")
        patch.setenv("Z4J_CLIENT_CERT", str(path))
        with pytest.raises(HostConfigurationError, match="Z4J_CLIENT_CERT"):
            install_agent(engines=[Engine()], **given)


def test_a_deprecated_path_is_refused(monkeypatch):
    """A path variable that z4j no longer reads is an error, because data would go elsewhere than its owner thinks."""
    monkeypatch.setenv("Z4J_BUFFER_PATH", "/tmp/x")
    with pytest.raises(RuntimeError, match="Z4J_BUFFER_PATH"):
        install_agent(engines=[Engine()], **GIVEN)


def test_disabled_is_inert(monkeypatch):
    """Z4J_DISABLED needs no other setting, takes no slot and never starts, not even when told to."""
    monkeypatch.setenv("Z4J_DISABLED", "1")
    runtime = install_agent(engines=[Engine()])
    runtime.start()
    assert runtime.state is RuntimeState.STOPPED
    assert singleton.current_runtime() is None
    runtime.record_event(object())
    runtime.stop()


def test_testing_keeps_what_is_recorded(monkeypatch):
    """Z4J_TESTING needs no other setting and starts nothing, and a test can look at the events that its code recorded."""
    monkeypatch.setenv("Z4J_TESTING", "1")
    runtime, event = install_agent(engines=[Engine()]), object()
    runtime.record_event(event)
    assert list(runtime.recorded) == [event]
    assert runtime.state is RuntimeState.STOPPED
    assert singleton.current_runtime() is None


def test_disabled_by_hand(monkeypatch):
    """An adapter that builds AgentRuntime itself gets an inert one as well."""
    config = install_agent(engines=[Engine()], autostart=False, **GIVEN).config
    monkeypatch.setenv("Z4J_DISABLED", "true")
    runtime = AgentRuntime(
        config=config, framework=BareFrameworkAdapter(config), engines=[Engine()]
    )
    runtime.start()
    assert runtime.state is RuntimeState.STOPPED


def test_a_visitor_stays_inert(argv):
    """Under celery inspect nothing starts: it would be a ghost worker in the brain."""
    argv("celery", "-A", "shop", "inspect", "ping")
    assert install_agent(engines=[Engine()], **GIVEN).state is RuntimeState.STOPPED


def test_a_worker_starts_at_worker_ready(argv):
    """In a Celery worker the agent waits for worker_ready, takes the node's name along, and stops at worker_shutdown."""
    from celery import signals

    argv("/usr/bin/celery", "-A", "shop", "worker", "-P", "gevent")
    engine = Engine()
    before = [list(signal.receivers) for signal in (signals.worker_ready, signals.worker_shutdown)]
    try:
        runtime = install_agent(engines=[engine], **GIVEN)
        assert runtime.state is RuntimeState.STOPPED
        signals.worker_ready.send(sender=Consumer())
        assert runtime.state is RuntimeState.RUNNING
        assert engine.worker_hostname == "w1@host"
        signals.worker_shutdown.send(sender=None)
        assert runtime.state is RuntimeState.STOPPED
    finally:
        signals.worker_ready.receivers[:], signals.worker_shutdown.receivers[:] = before


def test_a_worker_that_is_ready_already(argv, monkeypatch):
    """Installed from inside worker_ready or later, the agent starts at once: the signal will not come again."""
    argv("celery", "worker")
    monkeypatch.setattr(install, "ready_worker", object)
    assert install_agent(engines=[Engine()], **GIVEN).state is RuntimeState.RUNNING


def test_a_failed_start_frees_the_process(monkeypatch):
    """When start() raises, the next install_agent finds the process free."""

    def fail(_self):
        raise OSError("no more threads")

    monkeypatch.setattr(AgentRuntime, "start", fail)
    with pytest.raises(OSError, match="no more threads"):
        install_agent(engines=[Engine()], **GIVEN)
    assert singleton.current_runtime() is None


def test_a_failed_build_can_be_repeated(monkeypatch, tmp_path):
    """start() that failed for a setting leaves the runtime stopped, and works once the setting is right."""
    runtime = install_agent(engines=[Engine()], autostart=False, **GIVEN)
    monkeypatch.setenv("Z4J_CONCURRENCY", "trio")
    fresh = AgentRuntime(config=runtime.config, framework=runtime.framework, engines=[Engine()])
    with pytest.raises(HostConfigurationError):
        fresh.start()
    assert fresh.state is RuntimeState.STOPPED
    monkeypatch.delenv("Z4J_CONCURRENCY")
    fresh.start()
    assert fresh.state is RuntimeState.RUNNING
    fresh.stop(timeout=2)


def test_engines_of_one_name_collapse():
    """Of two engines with one name the last wins, as in the existing agent."""
    first, last = Engine(), Engine()
    runtime = install_agent(engines=[first, last], autostart=False, **GIVEN)
    assert runtime.engines == {"stub": last}


EXIT = """
import sys
from tests.launch import patch
patch(sys.argv[1])
from tests.support.peer import Peer, SECRET_TEXT, TOKEN
from z4j_bare import install_agent
from z4j_bare.concurrency import build
import os, time

class Engine:
    name = "stub"
    def capabilities(self):
        return set()

backend = build(sys.argv[1])
peer = Peer(backend)
runtime = install_agent(engines=[Engine()], brain_url=peer.url, token=TOKEN, project_id="p", hmac_secret=SECRET_TEXT)
deadline = time.monotonic() + 20
while not peer.frames("heartbeat") and time.monotonic() < deadline:
    backend.sleep(0.02)
import atexit
stop = runtime.stop
def watched(*args, **options):
    began = time.monotonic()
    stop(*args, **options)
    os.write(1, f"stopped {time.monotonic() - began < 10} {runtime.state}\\n".encode())
runtime.stop = watched
print(len(peer.frames("heartbeat")), flush=True)
"""


def test_the_exit_of_the_process_stops_the_agent(mode):
    """At interpreter exit the agent stops once, within its budget, in every mode, and the process ends."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXIT, mode],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["1", "stopped True stopped"]), (
        done.stderr
    )
    assert "Traceback" not in done.stderr


def test_the_note_of_readiness():
    """What hosting remembers of worker_ready is the Consumer that sent it."""
    before = hosting.ready_worker()
    sender = object()
    try:
        hosting._note_ready(sender=sender)
        assert hosting.ready_worker() is sender
    finally:
        hosting._consumer = before
