"""An event that a host records with ``AgentRuntime.record_event``."""

from datetime import UTC, datetime
from uuid import uuid4

from z4j_core.models import Event, EventKind


def success(task_id, name):
    """Return a ``task.succeeded`` event, for which the brain creates a task row."""
    return Event(
        id=uuid4(),
        project_id=uuid4(),  # The session determines the project and the agent.
        agent_id=uuid4(),
        engine="celery",
        task_id=task_id,
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data={"task_name": name},
    )
