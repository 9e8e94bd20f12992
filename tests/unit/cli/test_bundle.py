"""``z4j-bare doctor --bundle``: what it contains, and that it contains no secret."""

import base64
import json
import logging
import os
import stat
import tarfile
from urllib.parse import quote

import pytest

from tests.support.agents import installed_agents
from tests.support.combined_peer import CombinedPeer
from tests.support.engines import FakeEngine
from tests.support.environment import set_connection
from tests.support.peer import SECRET, SECRET_TEXT, TOKEN
from tests.support.processes import run_command
from z4j_bare.cli import bundle, main
from z4j_bare.errors import HostConfigurationError

PASSWORD = "hunter2-of-the-broker"

#: Secrets of variables and of addresses, and the variables that contain them.
VARIABLES = {
    "key-of-the-payments": ("STRIPE_API_KEY", "{}"),
    "token-of-the-queue": ("QUEUE_URL", "https://queue.example.com/jobs?access_token={}&wait=20"),
    "pw-of-the-results": ("CELERY_RESULT_BACKEND", "redis://cache/1?password={}"),
    "0123456789abcdef0123": ("ERRORS_URL", "https://{}@errors.example.com/42"),
}

SECRETS = (
    TOKEN,
    SECRET_TEXT.rstrip("="),
    SECRET.hex(),
    base64.b64encode(SECRET).decode().rstrip("="),
    PASSWORD,
    quote(PASSWORD),
    *VARIABLES,
)


def read(path):
    """Return the files of a bundle as texts, by their names without the directory."""
    with tarfile.open(path) as archive:
        return {
            each.name.removeprefix("z4j-bundle/"): archive.extractfile(each).read().decode()
            for each in archive.getmembers()
        }


@pytest.fixture
def brain(backend, monkeypatch):
    """A scripted brain, whose settings are in the environment."""
    made = CombinedPeer(backend)
    set_connection(monkeypatch, made.url)
    monkeypatch.setenv("CELERY_BROKER_URL", f"amqp://shop:{PASSWORD}@rabbit/orders")
    for secret, (name, text) in VARIABLES.items():
        monkeypatch.setenv(name, text.format(secret))
    yield made
    made.stop()


def test_bundle_describes_running_agent_without_secrets(brain, until, tmp_path):
    """The bundle has the state of the host and of its agents; no file has a secret in any form."""
    path = tmp_path / "report.tar.gz"
    with installed_agents(brain.ws, FakeEngine()) as install:
        install(brain_url=brain.url)
        until(lambda: brain.ws.frames("heartbeat"))
        log = logging.getLogger("z4j.runtime.of_test")
        for secret in SECRETS:
            log.warning("z4j: a line with %s", secret)
        log.warning("z4j: a task failed: %s", ValueError("4929-1234"))
        for secret, (_, text) in VARIABLES.items():
            log.warning("z4j: cannot use %s", text.format(secret))
            try:
                raise HostConfigurationError(text.format(secret)) from ValueError(secret)
            except HostConfigurationError:
                log.exception("z4j: a start failed")
        try:
            raise RuntimeError("4929-1234")
        except RuntimeError:
            log.exception("z4j: a task failed with a traceback")
        code, text = run_command(until, "doctor", "--bundle", str(path))
    assert code == 0, text
    assert f"files to {path}" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = read(path)
    log_file = f"log-bare-{os.getpid()}.txt"
    assert sorted(found) == [
        "README.txt",
        "about.json",
        "agents.json",
        "buffers.json",
        "doctor.json",
        "hub.json",
        log_file,
        "metrics.json",
        "settings.json",
        "status.json",
        "tasks.json",
    ]
    documents = {name: json.loads(text) for name, text in found.items() if ".json" in name}
    assert documents["doctor.json"]["ok"] is True
    assert documents["settings.json"]["project_id"] == "p"
    assert documents["settings.json"]["hmac_secret"] == "set"
    for name in ("agents.json", "status.json", "tasks.json", "hub.json", "metrics.json"):
        (agent,) = documents[name]
        assert (agent["pid"], "error" in agent) == (os.getpid(), False)
    assert documents["agents.json"][0]["settings"]["project_id"] == "demo"
    assert documents["agents.json"][0]["versions"]["z4j_bare"]
    assert documents["buffers.json"][0]["rows"] == {}
    assert found[log_file].count("WARNING z4j.runtime.of_test: z4j: a line with ***\n") == len(
        SECRETS
    )
    assert "a task failed: ValueError\n" in found[log_file]
    assert "RuntimeError\n  unit/cli/test_bundle.py:" in found[log_file]
    assert "cannot use redis://cache/1?password=***\n" in found[log_file]
    whole = "".join(found.values())
    assert [secret for secret in (*SECRETS, "4929-1234") if secret in whole] == []


def test_bundle_is_written_with_wrong_settings(capsys, tmp_path):
    """Wrong settings are a reason to write a bundle: it names the setting and has the rest."""
    path = tmp_path / "report.tar.gz"
    assert main(["doctor", "--json", "--bundle", str(path)]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["stage"], answer["bundle"]) == ("config", str(path))
    found = read(path)
    assert "brain_url" in json.loads(found["settings.json"])["error"]
    assert json.loads(found["doctor.json"])["ok"] is False
    assert json.loads(found["about.json"])["packages"]["z4j-core"]


@pytest.mark.parametrize("name", ["report.tar.gz", "missing/report.tar.gz"])
def test_bundle_overwrites_no_file(name, capsys, tmp_path):
    """An existing file and a missing directory are usage errors with a cure, before any probe."""
    (tmp_path / "report.tar.gz").write_text("mine")
    assert main(["doctor", "--bundle", str(tmp_path / name)]) == 2
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err.startswith(f"z4j-bare: cannot create --bundle {tmp_path / name}: ")
    assert (tmp_path / "report.tar.gz").read_text() == "mine"


def test_interrupted_bundle_leaves_no_file(monkeypatch, tmp_path):
    """An interrupted command removes the unfinished bundle."""

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "write", interrupt)
    assert main(["doctor", "--bundle", str(tmp_path / "report.tar.gz")]) == 130
    assert list(tmp_path.glob("*.gz")) == []
