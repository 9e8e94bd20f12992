"""Settings: keyword before environment before default, and errors that name the variable."""

from dataclasses import FrozenInstanceError, fields

import pytest

from z4j_bare.errors import AgentError, HostConfigurationError
from z4j_bare.settings import Settings, load_settings, read_secret

VARIABLES = {each.metadata["variable"]: each for each in fields(Settings)}


def test_settings_without_sources_have_defaults():
    """Without a keyword or variable the documented defaults apply, and they are immutable."""
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


def test_each_setting_has_its_own_variable():
    """Each setting can be given by an environment variable of its own."""
    assert len(VARIABLES) == len(fields(Settings))
    assert all(name.startswith("Z4J_") for name in VARIABLES)


def test_setting_from_several_sources_follows_precedence(monkeypatch):
    """A keyword overrides the environment, the environment the default; empty text is ignored."""
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
def test_bool_setting_accepts_spellings_of_on(text):
    """All usual spellings of on are accepted."""
    assert load_settings({"Z4J_DISABLED": text}).disabled is True


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
def test_bool_setting_accepts_spellings_of_off(text):
    """All usual spellings of off are accepted."""
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
def test_invalid_variable_raises_error_that_names_it(variable, text):
    """The error for an invalid value names its variable."""
    with pytest.raises(HostConfigurationError, match=variable) as caught:
        load_settings({variable: text})
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, AgentError)


def test_keyword_below_minimum_raises_error():
    """A keyword below its minimum is rejected under the name of the variable."""
    with pytest.raises(
        HostConfigurationError, match="Z4J_FLUSH_EVENTS=0 is below its minimum of 1"
    ):
        load_settings({}, flush_events=0)


def test_secret_file_is_read_without_whitespace(tmp_path):
    """A secret file must exist, and its content is returned without surrounding whitespace."""
    path = tmp_path / "token"
    path.write_text("  abc\n")
    found = load_settings({"Z4J_TOKEN_FILE": str(path)}).token_file
    assert found == path
    assert read_secret(found, "Z4J_TOKEN_FILE") == "abc"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_unusable_secret_file_raises_error(tmp_path, content):
    """An empty, binary or missing secret file raises an error that names its variable."""
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(HostConfigurationError, match="Z4J_TOKEN_FILE"):
        read_secret(path, "Z4J_TOKEN_FILE")
    with pytest.raises(HostConfigurationError, match="FileNotFoundError"):
        read_secret(tmp_path / "gone", "Z4J_TOKEN_FILE")


@pytest.mark.parametrize("variable", ["Z4J_TOKEN_FILE", "Z4J_HMAC_SECRET_FILE"])
@pytest.mark.parametrize(
    "secret", ["s" * 43, "s" * 300, "Sx/" + "s" * 39 + "/=", "s" * 21 + "\0" * 22]
)
def test_secret_in_place_of_file_is_not_shown(variable, secret):
    """A secret that was set as the path of its file appears neither in the error nor in a cause."""
    with pytest.raises(HostConfigurationError, match=variable) as caught:
        load_settings({variable: secret})
    assert "not the secret" in str(caught.value)
    assert secret not in str(caught.value)
    assert caught.value.__context__ is None


def test_file_in_home_of_unknown_user_raises_error():
    """For a path in the home of an unknown user, the error names the variable."""
    for variable in ("Z4J_TOKEN_FILE", "Z4J_CA_BUNDLE"):
        with pytest.raises(HostConfigurationError, match=f"{variable}=.*Use an absolute path"):
            load_settings({variable: "~nobody-with-this-name/file"})
