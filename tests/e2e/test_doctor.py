"""The doctor against the real brain: what only it can refuse is told by its cause, and it leaves no trace."""

import json
import subprocess
import sys
import uuid

import pytest

from z4j_bare.demo.process import clean_environment

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def agent(brain):
    """An agent in a project of its own."""
    project = f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)
    yield brain.mint_agent(project, "patient")
    brain.archive_project(project)


def doctor(agent, home, **changes):
    """Return exit code and answer of ``z4j-bare doctor --json``, told by probe."""
    environment = {**clean_environment(), **agent.env(home), **changes}
    command = [sys.executable, "-m", "z4j_bare", "doctor", "--json"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer["ok"] == (done.returncode == 0)
    return {probe["name"]: probe for probe in answer["probes"]}


def the_failure(probes):
    (bad,) = [probe for probe in probes.values() if not probe["ok"]]
    return bad["name"], bad["details"]["cause"]


def test_a_good_set_up(brain, agent, tmp_path):
    """All is well; the brain has heard no hello, so that a living agent's row keeps its engines."""
    probes = doctor(agent, tmp_path / "home")
    assert {
        name: probe["message"]
        for name, probe in probes.items()
        if not probe["message"].startswith("OK")
    } == {"tls": "SKIP: the address is plain http"}
    assert brain.agent_workers(agent.project) == []
    assert brain.agent(agent.project, agent.agent_id)["framework_adapter"] == "unknown"
    assert list((tmp_path / "home").iterdir()) == []


def test_what_the_brain_refuses(brain, agent, tmp_path):
    """A bad token, a bad key and an archived project are three different causes."""
    other = "".join(reversed(agent.hmac_secret.rstrip("=")))[:43]
    assert the_failure(doctor(agent, tmp_path / "home", Z4J_TOKEN="z4j_agent_of_nobody")) == (
        "token",
        "the brain does not know the token, or it was revoked",
    )
    assert the_failure(doctor(agent, tmp_path / "home", Z4J_HMAC_SECRET=other)) == (
        "signature",
        "the brain refuses the signature: the key is another one",
    )
    project = f"p-{uuid.uuid4().hex[:12]}"
    brain.create_project(project)
    doomed = brain.mint_agent(project, "doomed")
    brain.archive_project(project)
    assert the_failure(doctor(doomed, tmp_path / "home")) == (
        "token",
        f"the project {project} is archived",
    )
