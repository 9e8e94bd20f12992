"""install_agent and the runtime's lifecycle: when it starts, and the errors for wrong settings."""

import subprocess
import sys

import pytest
from z4j_core.errors import ConfigError

from tests.support.engines import FakeEngine
from tests.support.peer import SECRET_TEXT
from z4j_bare import (
    AgentRuntime,
    BareFrameworkAdapter,
    RuntimeState,
    install,
    install_agent,
    process,
)
from z4j_bare import _process_singleton as singleton
from z4j_bare.engines.manager import EngineManager
from z4j_bare.errors import HostConfigurationError


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
    """Clear the process's runtime before the test, and stop the test's own runtime afterwards."""
    singleton.clear_runtime()
    yield
    left = singleton.current_runtime()
    if left is not None:
        left.stop(timeout=2)
    singleton.clear_runtime()


@pytest.fixture
def argv(monkeypatch):
    return lambda *words: monkeypatch.setattr(sys, "argv", list(words))


def test_agent_outside_celery_starts_immediately():
    """Outside Celery the agent runs and is registered when install_agent returns."""
    engine = FakeEngine("retry_task")
    runtime = install_agent(engines=[engine], **GIVEN)
    assert runtime.state is RuntimeState.RUNNING
    assert (singleton.current_runtime(), singleton.current_owner()) == (runtime, "install_agent")
    assert runtime.engines == {"stub": engine}
    assert runtime.config.project_id == "demo"
    assert isinstance(runtime.framework, BareFrameworkAdapter)


def test_second_install_returns_first_runtime():
    """A second install_agent returns the first runtime and starts nothing."""
    first = install_agent(engines=[FakeEngine("retry_task")], **GIVEN)
    assert install_agent(engines=[FakeEngine("retry_task")], **GIVEN) is first


def test_install_after_stop_starts_new_runtime():
    """After stop() the next install_agent starts a new runtime."""
    first = install_agent(engines=[FakeEngine("retry_task")], **GIVEN)
    first.stop(timeout=2)
    second = install_agent(engines=[FakeEngine("retry_task")], **GIVEN)
    assert second is not first
    assert second.state is RuntimeState.RUNNING


def test_runtime_without_autostart_runs_after_start():
    """With autostart off the runtime is built but stopped until start()."""
    runtime = install_agent(engines=[FakeEngine("retry_task")], autostart=False, **GIVEN)
    assert runtime.state is RuntimeState.STOPPED
    assert runtime.stats() == {"state": "stopped"}
    assert (runtime.buffer_size(), runtime.supervisor_state()["session_id"]) == (0, None)
    runtime.start()
    runtime.start()
    assert runtime.state is RuntimeState.RUNNING


def test_calls_before_start_do_nothing():
    """Every public method can be called on a runtime that was never started."""
    runtime = install_agent(engines=[FakeEngine("retry_task")], autostart=False, **GIVEN)
    runtime.record_event(object())
    runtime.request_reconnect()
    runtime.reinit_after_fork()
    runtime.stop()
    assert runtime.state is RuntimeState.STOPPED


@pytest.mark.parametrize("given", [BareFrameworkAdapter, "instance", None])
def test_framework_may_be_class_or_instance(given):
    """The framework is an adapter class or instance, and BareFrameworkAdapter by default."""
    config = install_agent(engines=[FakeEngine("retry_task")], autostart=False, **GIVEN).config
    singleton.clear_runtime()
    instance = BareFrameworkAdapter(config)
    runtime = install_agent(
        engines=[FakeEngine("retry_task")],
        autostart=False,
        framework=instance if given == "instance" else given,
        **GIVEN,
    )
    assert isinstance(runtime.framework, BareFrameworkAdapter)
    assert given != "instance" or runtime.framework is instance


def test_missing_keywords_are_read_from_environment(monkeypatch):
    """A setting without a keyword is read from its Z4J_* variable."""
    for name, value in (
        ("BRAIN_URL", GIVEN["brain_url"]),
        ("TOKEN", "tok"),
        ("PROJECT_ID", "from-env"),
        ("HMAC_SECRET", SECRET_TEXT),
    ):
        monkeypatch.setenv(f"Z4J_{name}", value)
    runtime = install_agent(engines=[FakeEngine("retry_task")])
    assert runtime.state is RuntimeState.RUNNING
    assert runtime.config.project_id == "from-env"


def test_token_file_replaces_token(tmp_path):
    """With token_file no token is required."""
    path = tmp_path / "token"
    path.write_text("tok\n")
    given = {**GIVEN, "token": None, "token_file": path}
    assert install_agent(engines=[FakeEngine("retry_task")], **given).state is RuntimeState.RUNNING


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
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
def test_wrong_keyword_raises_error_that_names_setting(changes, kind, message):
    """The error names the setting and quotes no secret, and nothing is registered."""
    with pytest.raises(kind) as caught:
        install_agent(**{"engines": [FakeEngine("retry_task")], **GIVEN, **changes})
    text = f"{caught.value} {getattr(caught.value, 'details', '')}"
    assert message in text
    assert "\n" not in text
    assert SECRET_TEXT not in text
    assert str(changes.get("hmac_secret")) not in str(caught.value)
    assert singleton.current_runtime() is None


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("Z4J_BUFFER_MAX_EVENTS", "many", "Z4J_BUFFER_MAX_EVENTS must be an integer"),
        ("Z4J_HEARTBEAT_SECONDS", "0", "Z4J_HEARTBEAT_SECONDS=0: "),
        ("Z4J_TRANSPORT", "pigeon", "Z4J_TRANSPORT='pigeon': "),
    ],
)
def test_wrong_variable_raises_error_that_names_it(monkeypatch, variable, text, message):
    """A validation error of z4j_core becomes one line that names the variable."""
    monkeypatch.setenv(variable, text)
    with pytest.raises(HostConfigurationError, match=f"^{message}") as caught:
        install_agent(engines=[FakeEngine("retry_task")], **GIVEN)
    assert "\n" not in str(caught.value)


def test_wrong_key_file_is_named_by_its_variable(tmp_path):
    """The error for a wrong key file names the file's variable, not that of the value."""
    path = tmp_path / "key"
    path.write_text("c2hvcnQ=")
    with pytest.raises(HostConfigurationError, match="Z4J_HMAC_SECRET_FILE decodes to 5 bytes"):
        install_agent(engines=[FakeEngine("retry_task")], hmac_secret_file=path, **GIVEN)
    path.write_text("")
    with pytest.raises(HostConfigurationError, match="the file is empty"):
        install_agent(engines=[FakeEngine("retry_task")], hmac_secret_file=path, **GIVEN)


def test_invalid_certificate_file_fails_at_start(tmp_path):
    """An invalid certificate file fails at start with an error that names its variable."""
    path = tmp_path / "ca.pem"
    path.write_text("not a certificate")
    given = {**GIVEN, "brain_url": "https://brain.example.com"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("Z4J_CA_BUNDLE", str(path))
        with pytest.raises(HostConfigurationError, match="Z4J_CA_BUNDLE"):
            install_agent(engines=[FakeEngine("retry_task")], **given)
        patch.delenv("Z4J_CA_BUNDLE")
        patch.setenv("Z4J_CLIENT_CERT", str(path))
        with pytest.raises(HostConfigurationError, match="Z4J_CLIENT_CERT"):
            install_agent(engines=[FakeEngine("retry_task")], **given)


def test_deprecated_path_variable_raises_error(monkeypatch):
    """A path variable that z4j no longer reads is an error, because data would go elsewhere."""
    monkeypatch.setenv("Z4J_BUFFER_PATH", "/tmp/x")
    with pytest.raises(RuntimeError, match="Z4J_BUFFER_PATH"):
        install_agent(engines=[FakeEngine("retry_task")], **GIVEN)


def test_disabled_runtime_never_starts(monkeypatch):
    """Z4J_DISABLED needs no other setting, registers nothing, and makes start() do nothing."""
    monkeypatch.setenv("Z4J_DISABLED", "1")
    runtime = install_agent(engines=[FakeEngine("retry_task")])
    runtime.start()
    assert runtime.state is RuntimeState.STOPPED
    assert singleton.current_runtime() is None
    runtime.record_event(object())
    runtime.stop()


def test_runtime_under_testing_keeps_recorded_events(monkeypatch):
    """Z4J_TESTING needs no other setting, starts nothing, and keeps recorded events."""
    monkeypatch.setenv("Z4J_TESTING", "1")
    runtime, event = install_agent(engines=[FakeEngine("retry_task")]), object()
    runtime.record_event(event)
    assert list(runtime.recorded) == [event]
    assert runtime.state is RuntimeState.STOPPED
    assert singleton.current_runtime() is None


def test_disabled_runtime_built_by_adapter_never_starts(monkeypatch):
    """Z4J_DISABLED also applies to a runtime that an adapter builds itself."""
    config = install_agent(engines=[FakeEngine("retry_task")], autostart=False, **GIVEN).config
    monkeypatch.setenv("Z4J_DISABLED", "true")
    runtime = AgentRuntime(
        config=config, framework=BareFrameworkAdapter(config), engines=[FakeEngine("retry_task")]
    )
    runtime.start()
    assert runtime.state is RuntimeState.STOPPED


def test_agent_in_inspection_command_never_starts(argv):
    """Under celery inspect nothing starts, because it would leave a stale worker in the brain."""
    argv("celery", "-A", "shop", "inspect", "ping")
    assert install_agent(engines=[FakeEngine("retry_task")], **GIVEN).state is RuntimeState.STOPPED


def test_agent_in_celery_worker_starts_at_worker_ready(argv):
    """The agent starts at worker_ready with the node's name, and stops at worker_shutdown."""
    from celery import signals

    argv("/usr/bin/celery", "-A", "shop", "worker", "-P", "gevent")
    engine = FakeEngine("retry_task")
    engine.worker_hostname = None
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


def test_agent_installed_after_worker_ready_starts_immediately(argv, monkeypatch):
    """Installed during or after worker_ready, which is not sent again, the agent starts now."""
    argv("celery", "worker")
    monkeypatch.setattr(install, "ready_worker", object)
    assert install_agent(engines=[FakeEngine("retry_task")], **GIVEN).state is RuntimeState.RUNNING


def test_failed_start_unregisters_runtime(monkeypatch):
    """When start() raises, the process has no registered runtime."""

    def fail(_self):
        raise OSError("no more threads")

    monkeypatch.setattr(AgentRuntime, "start", fail)
    with pytest.raises(OSError, match="no more threads"):
        install_agent(engines=[FakeEngine("retry_task")], **GIVEN)
    assert singleton.current_runtime() is None


def test_start_after_failed_build_succeeds(monkeypatch, tmp_path):
    """A start() that failed for a setting leaves the runtime stopped; a later one succeeds."""
    runtime = install_agent(engines=[FakeEngine("retry_task")], autostart=False, **GIVEN)
    monkeypatch.setenv("Z4J_CONCURRENCY", "trio")
    fresh = AgentRuntime(
        config=runtime.config, framework=runtime.framework, engines=[FakeEngine("retry_task")]
    )
    with pytest.raises(HostConfigurationError):
        fresh.start()
    assert fresh.state is RuntimeState.STOPPED
    monkeypatch.delenv("Z4J_CONCURRENCY")
    fresh.start()
    assert fresh.state is RuntimeState.RUNNING
    fresh.stop(timeout=2)


def test_start_that_fails_halfway_stops_agent(monkeypatch):
    """If a loop cannot be started, start() raises, the started loops end, and a later one works."""
    runtime = install_agent(engines=[FakeEngine("retry_task")], autostart=False, **GIVEN)
    agents = []

    def fail(manager):
        agents.append(runtime._agent)
        raise OSError("no more threads")

    with monkeypatch.context() as patch:
        patch.setattr(EngineManager, "loops", fail)
        with pytest.raises(OSError, match="no more threads"):
            runtime.start()
    assert runtime.state is RuntimeState.STOPPED
    assert not runtime.has_stopped
    assert runtime.stats() == {"state": "stopped"}
    (agent,) = agents
    assert len(agent.stuck(60)) > 3, "the loops of the failed start have ended"
    runtime.start()
    assert runtime.state is RuntimeState.RUNNING
    assert runtime.stuck(60) == []


def test_last_engine_with_same_name_wins():
    """Of two engines with the same name the last one is used."""
    first, last = FakeEngine("retry_task"), FakeEngine("retry_task")
    runtime = install_agent(engines=[first, last], autostart=False, **GIVEN)
    assert runtime.engines == {"stub": last}


EXIT = """
import sys
from tests.launch import patch
patch(sys.argv[1])
from tests.support.engines import FakeEngine
from tests.support.peer import Peer, SECRET_TEXT, TOKEN
from z4j_bare import install_agent
from z4j_bare.concurrency import build
import os, time


backend = build(sys.argv[1])
peer = Peer(backend)
runtime = install_agent(
    engines=[FakeEngine()], brain_url=peer.url, token=TOKEN, project_id="p", hmac_secret=SECRET_TEXT
)
deadline = time.monotonic() + 20
while not peer.frames("heartbeat") and time.monotonic() < deadline:
    backend.sleep(0.02)
import atexit
stop = runtime.stop
def timed_stop(*args, **options):
    began = time.monotonic()
    stop(*args, **options)
    os.write(1, f"stopped {time.monotonic() - began < 10} {runtime.state}\\n".encode())
runtime.stop = timed_stop
print(len(peer.frames("heartbeat")), flush=True)
"""


def test_interpreter_exit_stops_agent(mode):
    """At interpreter exit the agent stops once, within its timeout, in every mode."""
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


def test_worker_ready_handler_keeps_consumer():
    """The Consumer that sent worker_ready is returned by ready_worker()."""
    before = process.ready_worker()
    sender = object()
    try:
        process._on_worker_ready(sender=sender)
        assert process.ready_worker() is sender
    finally:
        process._consumer = before
