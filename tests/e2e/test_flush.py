"""``z4j-bare buffer flush`` sends the events of a dead process to the brain without an agent."""

import json
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from z4j_bare.buffer.rows import EVENT
from z4j_bare.buffer.store import BufferStore
from z4j_bare.demo.process import clean_environment
from z4j_bare.install import resolve_config
from z4j_bare.settings import deployment_id, load_settings, read_key
from z4j_bare.wire.frames import encode_fields

pytestmark = pytest.mark.timeout(120)

EVENTS = 60


def test_flush_sends_events_without_session(brain, tmp_path, monkeypatch):
    """All events arrive, the file is deleted, and the brain has received no hello."""
    project, task = f"p-{uuid.uuid4().hex[:12]}", str(uuid.uuid4())
    brain.create_project(project)
    agent = brain.mint_agent(project, "flush")
    for name, value in agent.env(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    config = resolve_config(settings)
    store = BufferStore(
        tmp_path / "home" / "z4j-green-dead.sqlite",
        deployment=deployment_id(config, read_key(config, settings)),
    )
    store.append([(EVENT, "", event(task, number)) for number in range(EVENTS)])
    store.close()
    command = [sys.executable, "-m", "z4j_bare", "buffer", "flush", "--json"]
    environment = {**clean_environment(), **agent.env(tmp_path / "home")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    outcome = {"schema": 1, "sent": EVENTS, "left": 0, "passed_over": [], "error": ""}
    assert json.loads(done.stdout) == outcome
    assert sorted(row["payload"]["number"] for row in brain.events(project, "stub", task)) == list(
        range(EVENTS)
    )
    assert list((tmp_path / "home").iterdir()) == []
    assert brain.agent_workers(project) == []
    brain.archive_project(project)


def event(task, number):
    # The brain distinguishes events of one task by their times.
    stamp = (datetime.now(UTC) + timedelta(seconds=number)).isoformat()
    return encode_fields(
        {
            "id": str(uuid.uuid4()),
            "kind": "task.started",
            "engine": "stub",
            "task_id": task,
            "occurred_at": stamp,
            "data": {"number": number},
        }
    )
