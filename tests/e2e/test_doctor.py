"""The doctor command against the real brain: it names causes and leaves no trace."""

import json
import subprocess
import sys
import uuid

import pytest

from z4j_bare.demo.process import clean_environment

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
