"""Secrets are removed from texts in every usual encoding."""

import base64
import json
from urllib.parse import quote

import pytest
from z4j_core.models import Config

from tests.support.peer import SECRET, SECRET_TEXT
from z4j_bare.monitoring.scrubber import Scrubber, configured_secrets, environment_secrets
from z4j_bare.settings import load_settings

PASSWORD = 'p@ss/wö"rd\\'

ENCODINGS = {
    "text": PASSWORD,
    "in an address": quote(PASSWORD, safe=""),
    "JSON": json.dumps(PASSWORD)[1:-1],
    "repr": repr(PASSWORD)[1:-1],
    "base64": base64.b64encode(PASSWORD.encode()).decode(),
    "hexadecimal": PASSWORD.encode().hex(),
}

KEY_ENCODINGS = {
    "as minted": SECRET_TEXT,
    "without padding": SECRET_TEXT.rstrip("="),
    "standard base64": base64.b64encode(SECRET).decode(),
    "hexadecimal": SECRET.hex(),
    "repr of the key": repr(SECRET)[2:-1],
    "base64 of the text": base64.b64encode(SECRET_TEXT.encode()).decode(),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_secret_is_removed_in_every_encoding(encoding):
    """A known secret is replaced wherever a text contains it, whatever its encoding."""
    text = f"login of shop with {ENCODINGS[encoding]} failed"
    assert Scrubber([PASSWORD]).text(text) == "login of shop with *** failed"


@pytest.mark.parametrize("encoding", KEY_ENCODINGS)
def test_key_is_removed_in_every_encoding(encoding):
    """The HMAC secret is replaced as text and as the key that it encodes."""
    assert Scrubber([SECRET_TEXT]).text(f"key {KEY_ENCODINGS[encoding]}.") == "key ***."


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("amqp://shop:pw@rabbit:5672/orders", "amqp://shop:***@rabbit:5672/orders"),
        ("redis://:a/b@c@host/0 is down", "redis://:***@host/0 is down"),
        ("redis://host:6379/0 is down", "redis://host:6379/0 is down"),
        ("host=db password=pw user=shop", "host=db password=*** user=shop"),
        ("https://host/jobs?access_token=pw&wait=1", "https://host/jobs?access_token=***&wait=1"),
        ("Z4J_HMAC_SECRET=pw is wrong", "Z4J_HMAC_SECRET=*** is wrong"),
        ("Z4J_TOKEN_FILE=/run/token is missing", "Z4J_TOKEN_FILE=/run/token is missing"),
        ("https://0123456789abcdef@host/42", "https://***@host/42"),
        ("amqp://guest@host//", "amqp://guest@host//"),
        ("the token: check Z4J_TOKEN", "the token: check Z4J_TOKEN"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        ("Basic d29ya2VyOnB3", "Basic ***"),
        ("celery@web-1 at https://brain.example.com", "celery@web-1 at https://brain.example.com"),
    ],
)
def test_unknown_secret_is_removed_by_its_form(text, scrubbed):
    """Passwords of URLs and of connection strings, and headers, are removed without a list."""
    assert Scrubber([]).text(text) == scrubbed


def test_document_is_copied_without_secrets():
    """Keys and texts at every depth are scrubbed; numbers stay numbers."""
    document = {"a": [1, {"x swordfish": ("swordfish", None, 1.5, True)}]}
    assert Scrubber(["swordfish"]).document(document) == {
        "a": [1, {"x ***": ["***", None, 1.5, True]}]
    }


def test_short_secret_does_not_destroy_texts():
    """An empty or very short value is not searched in texts."""
    assert Scrubber(["", "a", "1"]).text("a text of 1 line") == "a text of 1 line"


def test_environment_names_secrets(tmp_path):
    """Secrets of the environment are found by the variable's name, and in addresses and files."""
    token = tmp_path / "token"
    token.write_text("of-the-file\n")
    found = environment_secrets(
        {
            "DB_PASSWORD": "one",
            "PGPASSWORD": "two",
            "STRIPE_API_KEY": "three",
            "BROKER": "redis://:four@host/0",
            "Z4J_TOKEN_FILE": str(token),
            "Z4J_REDACTION_EXTRA_KEY_PATTERNS": "iban",
            "PATH": "/bin",
        }
    )
    assert sorted(found) == ["four", "of-the-file", "one", "three", "two"]


def test_secrets_of_an_agent_come_from_its_settings_and_files(tmp_path):
    """The values of keywords and the content of the files are both secrets of the agent."""
    file = tmp_path / "token"
    file.write_text("rotated")
    config = Config(
        brain_url="http://127.0.0.1:9", token="first", project_id="p", hmac_secret=SECRET_TEXT
    )
    found = configured_secrets(config, load_settings({}, token_file=file))
    assert set(found) == {"first", "rotated", SECRET_TEXT}
