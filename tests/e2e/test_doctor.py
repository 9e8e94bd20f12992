"""The doctor command against the real brain: it names causes and leaves no trace; its bundle."""

import base64
import json
import subprocess
import sys
import tarfile
import uuid
from urllib.parse import urlsplit

import pytest

from z4j_bare.demo.process import clean_environment, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def agent(brain):
    """An agent in its own project."""
    project = f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)
    yield brain.mint_agent(project, "doctor")
    brain.archive_project(project)


def doctor(agent, home, **changes):
    """Run ``z4j-bare doctor --json`` and return its probes by name."""
    environment = {**clean_environment(), **agent.env(home), **changes}
    command = [sys.executable, "-m", "z4j_bare", "doctor", "--json"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return {probe["name"]: probe for probe in report["probes"]}


def only_failure(probes):
    (failed,) = [probe for probe in probes.values() if not probe["ok"]]
    return failed["name"], failed["details"]["cause"]


def test_correct_setup_passes_without_trace(brain, agent, tmp_path):
    """All probes pass; without a hello, the brain keeps the row of a connected agent unchanged."""
    probes = doctor(agent, tmp_path / "home")
    assert {
        name: probe["message"]
        for name, probe in probes.items()
        if not probe["message"].startswith("OK")
    } == {"tls": "SKIP: the address is plain http"}
    assert brain.agent_workers(agent.project) == []
    assert brain.agent(agent.project, agent.agent_id)["framework_adapter"] == "unknown"
    assert list((tmp_path / "home").iterdir()) == []


def test_rejections_of_brain_have_distinct_causes(brain, agent, tmp_path):
    """A wrong token, a wrong key and an archived project have three different causes."""
    other = "".join(reversed(agent.hmac_secret.rstrip("=")))[:43]
    assert only_failure(doctor(agent, tmp_path / "home", Z4J_TOKEN="z4j_agent_of_nobody")) == (
        "token",
        "the brain does not know the token, or it was revoked",
    )
    assert only_failure(doctor(agent, tmp_path / "home", Z4J_HMAC_SECRET=other)) == (
        "signature",
        "the brain rejects the signature: the key is not this project's",
    )
    project = f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)
    revoked = brain.mint_agent(project, "revoked")
    brain.archive_project(project)
    assert only_failure(doctor(revoked, tmp_path / "home")) == (
        "token",
        f"the project {project} is archived",
    )


def test_bundle_of_working_worker_has_no_secret(fresh_project, redis_url, tmp_path):
    """The bundle shows the running task's place and the log, and none of the lab's secrets."""
    database, card, seconds = "pw-of-the-database", "4929-1234-5678", 61.37519
    variables = {"DATABASE_URL": f"postgresql://shop:{database}@127.0.0.1/shop"}
    worker = fresh_project.worker(pool="gevent", environment=variables)
    fresh_project.row(fresh_project.send("fails", card), "failure")
    fresh_project.send("wait", seconds)
    until((fresh_project.home / "wait.started").exists, "a running task", timeout=40)
    path = tmp_path / "report.tar.gz"
    done = subprocess.run(
        [sys.executable, "-m", "z4j_bare", "doctor", "--bundle", str(path)],
        env={**clean_environment(), **fresh_project.environment(**variables)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    worker.kill()  # a warm shutdown would wait for the task
    with tarfile.open(path) as archive:
        found = {
            each.name.partition("/")[2]: archive.extractfile(each).read().decode()
            for each in archive.getmembers()
        }
    (agent,) = json.loads(found["tasks.json"])
    (task,) = agent["tasks"]
    assert (task["name"], "in wait" in task["position"]) == ("e2e.wait", True)
    assert json.loads(found["hub.json"])[0]["has_hub"] is True
    assert json.loads(found["agents.json"])[0]["versions"]["celery"]
    (log,) = (text for name, text in found.items() if name.startswith("log-"))
    assert "z4j: agent started for project" in log
    key = fresh_project.agent.hmac_secret
    raw = base64.urlsafe_b64decode(key)
    secrets = {
        "token": fresh_project.agent.token,
        "HMAC secret": key.rstrip("="),
        "HMAC secret in base64": base64.b64encode(raw).decode().rstrip("="),
        "HMAC secret in hexadecimal": raw.hex(),
        "password of the broker": urlsplit(redis_url).password,
        "password of the database": database,
        "argument of a failed task": card,
        "argument of a running task": str(seconds),
    }
    whole = "".join(found.values())
    assert [name for name, secret in secrets.items() if secret in whole] == []
