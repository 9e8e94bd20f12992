"""An event of the host's own making, for ``AgentRuntime.record_event``."""

from datetime import UTC, datetime
from uuid import uuid4

from z4j_core.models import Event, EventKind


def success(task_id, name):
    """Return a ``task.succeeded``; the brain makes a row of it."""
    return Event(
        id=uuid4(),
        project_id=uuid4(),  # the agent's session says which project and agent it belongs to
        agent_id=uuid4(),
        engine="celery",
        task_id=task_id,
        kind=EventKind.TASK_SUCCEEDED,
        occurred_at=datetime.now(UTC),
        data={"task_name": name},
    )
