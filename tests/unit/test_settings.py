"""Settings: keyword before environment before default, and every mistake named."""

from dataclasses import FrozenInstanceError, fields

import pytest

from z4j_bare.errors import AgentError, HostConfigurationError
from z4j_bare.settings import Settings, load_settings, read_secret

VARIABLES = {each.metadata["variable"]: each for each in fields(Settings)}


def test_defaults():
    """Without any setting the documented defaults hold, and they cannot be changed afterwards."""
    found = load_settings({})
    assert (found.concurrency, found.disabled, found.heartbeat) == ("auto", False, True)
    assert (found.flush_interval, found.flush_events, found.flush_seconds, found.ring_events) == (
        0.2,
        256,
        2.0,
        10_000,
    )
    assert (found.token_file, found.hmac_secret_file, found.ca_bundle, found.command_workers) == (
        None,
        None,
        None,
        8,
    )
    with pytest.raises(FrozenInstanceError):
        found.disabled = True


def test_every_field_has_its_variable():
    """Every setting can be given by environment, under a name of its own."""
    assert len(VARIABLES) == len(fields(Settings))
    assert all(name.startswith("Z4J_") for name in VARIABLES)


def test_precedence(monkeypatch):
    """A keyword beats the environment, the environment beats the default, an empty value counts as none."""
    env = {"Z4J_CONCURRENCY": "gevent", "Z4J_FLUSH_EVENTS": " 7 ", "Z4J_RING_EVENTS": ""}
    found = load_settings(env, concurrency="threads", flush_seconds=None)
    assert (found.concurrency, found.flush_events, found.ring_events, found.flush_seconds) == (
        "threads",
        7,
        10_000,
        2.0,
    )
    monkeypatch.setenv("Z4J_COMMAND_WORKERS", "3")
    assert load_settings().command_workers == 3


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_on(text):
    """All usual spellings of on are understood."""
    assert load_settings({"Z4J_DISABLED": text}).disabled is True


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
def test_off(text):
    """All usual spellings of off are understood."""
    assert load_settings({"Z4J_HEARTBEAT": text}).heartbeat is False


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("Z4J_DISABLED", "maybe"),
        ("Z4J_HEARTBEAT", "2"),
        ("Z4J_FLUSH_EVENTS", "many"),
        ("Z4J_FLUSH_EVENTS", "1.5"),
        ("Z4J_FLUSH_EVENTS", "0"),
        ("Z4J_FLUSH_INTERVAL_SECONDS", "0"),
        ("Z4J_FLUSH_INTERVAL_SECONDS", "nan"),
        ("Z4J_FLUSH_INTERVAL_SECONDS", "inf"),
        ("Z4J_FLUSH_INTERVAL_SECONDS", "-1"),
        ("Z4J_FLUSH_SECONDS", "-0.1"),
        ("Z4J_FLUSH_SECONDS", "1e999"),
        ("Z4J_RING_EVENTS", "-5"),
        ("Z4J_COMMAND_WORKERS", "0"),
        ("Z4J_TOKEN_FILE", "/nowhere/at/all"),
        ("Z4J_HMAC_SECRET_FILE", "/"),
        ("Z4J_CA_BUNDLE", "/nowhere.pem"),
        ("Z4J_CLIENT_CERT", "/nowhere.pem"),
        ("Z4J_CLIENT_KEY", "/nowhere.pem"),
    ],
)
def test_mistakes_are_named(variable, text):
    """A value that cannot be is an error that names its variable and quotes the value."""
    with pytest.raises(HostConfigurationError, match=variable) as caught:
        load_settings({variable: text})
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, AgentError)


def test_keywords_are_checked_too():
    """A keyword below its bound is refused under the variable's name."""
    with pytest.raises(
        HostConfigurationError, match="Z4J_FLUSH_EVENTS=0 is below its minimum of 1"
    ):
        load_settings({}, flush_events=0)


def test_files(tmp_path):
    """A path is expanded and must exist; its content is the one line in it."""
    path = tmp_path / "token"
    path.write_text("  abc\n")
    found = load_settings({"Z4J_TOKEN_FILE": str(path)}).token_file
    assert found == path
    assert read_secret(found, "Z4J_TOKEN_FILE") == "abc"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_files_that_hold_no_secret(tmp_path, content):
    """An empty or binary secret file is named, and its content is not quoted."""
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(HostConfigurationError, match="Z4J_TOKEN_FILE"):
        read_secret(path, "Z4J_TOKEN_FILE")
    with pytest.raises(HostConfigurationError, match="FileNotFoundError"):
        read_secret(tmp_path / "gone", "Z4J_TOKEN_FILE")
