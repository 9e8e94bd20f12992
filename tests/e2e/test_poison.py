"""Rows that the real brain cannot process are dropped, and all other rows arrive."""

import json
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from z4j_core.models import Event, EventKind

from z4j_bare import _process_singleton, install_agent
from z4j_bare.buffer.rows import EVENT, RESULT
from z4j_bare.demo.process import until

pytestmark = pytest.mark.timeout(180)

EVENTS = 200


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def brain(request, brain):
    """A brain on each database, which refuses the rows in different ways."""
    return brain if request.param == "sqlite" else request.getfixturevalue("postgres_brain")


class Engine:
    name = "stub"

    def capabilities(self):
        return set()


def make_event(number):
    return Event.model_construct(
        id=uuid4(),
        engine="stub",
        task_id=f"t-{number}",
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data={"task_name": "e2e.stub", "result": number},
    )


def test_poison_rows_are_dropped_and_counted(brain, agent_credentials, caplog, capsys):
    """A NaN in an event and an invalid result status end each session until they are dropped.

    Over long-poll the brain discards the whole frame of such an event and reports it as accepted.
    """
    agent = agent_credentials()
    runtime = install_agent(
        engines=[Engine()],
        brain_url=agent.brain_url,
        token=agent.token,
        project_id=agent.project,
        hmac_secret=agent.hmac_secret,
        transport="ws",
    )
    fields = {
        "id": str(uuid4()),
        "kind": "task.succeeded",
        "engine": "stub",
        "task_id": "bad",
        "data": {"x": float("nan")},
    }
    try:
        for number in range(EVENTS):
            runtime.record_event(make_event(number))
            if number == EVENTS // 2:
                until(lambda: runtime.stats()["stored"] > EVENTS // 2, "the first half", timeout=20)
                runtime._agent.buffer.append([(EVENT, "bad", json.dumps(fields).encode())])
                runtime._agent.buffer.append([(RESULT, str(uuid4()), b'{"status":"nonsense"}')])
        until(lambda: not runtime._agent.buffer.stats().rows, "an empty buffer", timeout=120)
        assert runtime.stats()["lost"] == {"poison": 2}
        assert sorted(
            row["result"] for row in brain.tasks(agent.project) if row["task_id"] != "bad"
        ) == list(range(EVENTS))
        with capsys.disabled():
            print(f"\n{runtime.stats()['sessions']} sessions")
    finally:
        runtime.stop()
        _process_singleton.clear_runtime(expected=runtime)
    assert caplog.text.count("dropped a row that the brain cannot accept") == 2
