"""Runs under the existing agent and under this one: records events, changes schedules.

``record PREFIX NUMBER`` stops with unsent events, and ``kill PREFIX NUMBER`` ends like a killed
process. ``serve PREFIX...`` runs until stdin is closed. ``change`` and ``schedules`` use the file.
``create PREFIX NUMBER`` waits for a line on stdin, and then creates NUMBER schedules.
"""

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from celery import Celery
from z4j_celery import CeleryEngineAdapter
from z4j_core.models import Event, Schedule
from z4j_core.models.event import EventKind
from z4j_core.schedule_external import normalize_external_schedule

from z4j_bare import NativeScheduleControl, install_agent

OWNER = "huey-periodic"
CODE = ("paused", "changed", "deleted", "untouched")
NEW = {"task_name": "shop.clean", "kind": "cron", "expression": "5 * * * *", "args": [True, 1]}


def start():
    return install_agent(
        engines=[CeleryEngineAdapter(celery_app=Celery("either", broker="memory://"))]
    )


def record(runtime, prefix, number):
    """Record a complete run of each task."""
    for index in range(number):
        for kind in ("task.received", "task.started", "task.succeeded"):
            data = {"task_name": "shop.add", "args": [index]} if kind == "task.received" else {}
            event = Event(
                id=uuid4(),
                project_id=uuid4(),
                agent_id=uuid4(),
                engine="celery",
                task_id=f"{prefix}-{index}",
                kind=EventKind(kind),
                occurred_at=datetime.now(UTC),
                data=data,
            )
            runtime.record_event(event)


def in_code(name, expression="0 3 * * *"):
    """Return a schedule that is defined in code."""
    fields = {
        "id": str(uuid5(NAMESPACE_URL, name)),
        "project_id": str(UUID(int=1)),
        "engine": "huey",
        "scheduler": OWNER,
        "name": name,
        "external_id": f"huey-periodic:{name}",
        "task_name": f"shop.{name}",
        "kind": "cron",
        "expression": expression,
        "created_at": "2026-01-01T00:00:00Z",
        "updated_at": "2026-01-01T00:00:00Z",
    }
    return Schedule.model_validate_json(json.dumps(fields))


def mutate(control, operation, target="", **definition):
    """Change the schedule whose name is ``target``, or create a schedule."""
    baseline = [in_code(each) for each in CODE]
    current = {each.name: each for each in control.resolve(baseline, owner=OWNER)}
    seen = expected = None
    if target:
        seen = current[target]
        expected = normalize_external_schedule(seen.model_dump(mode="json"), owner=OWNER)
    control.mutate(
        owner=OWNER,
        operation=operation,
        schedule_id=seen and seen.external_id,
        expected=expected,
        definition=definition,
        baseline=baseline,
        validate=lambda _: None,
        engine="huey",
    )


def change(control):
    """Make each kind of change."""
    mutate(control, "update", "paused", is_enabled=False)
    mutate(control, "update", "changed", is_enabled=False, expression="9 9 * * *")
    mutate(control, "update", "untouched", is_enabled=False)
    mutate(control, "update", "untouched", is_enabled=True)
    mutate(control, "delete", "deleted")
    mutate(control, "create", name="made 'ü\"", **NEW)
    mutate(control, "update", "made 'ü\"", expression="6 * * * *")
    mutate(control, "create", name="made and deleted", **NEW)
    mutate(control, "delete", "made and deleted")


def main():
    action, *arguments = sys.argv[1:]
    if action in ("record", "kill"):
        runtime = start()
        record(runtime, arguments[0], int(arguments[1]))
        time.sleep(1.0)  # the agent stores what it has recorded within 0.2 s
        if action == "kill":
            os._exit(0)
        runtime.stop()
    elif action == "serve":
        runtime = start()
        for prefix in arguments:
            record(runtime, prefix, 1)
        print("serving", flush=True)
        sys.stdin.read()
        runtime.stop()
    control = NativeScheduleControl(Path(os.environ["Z4J_HOME"]) / "schedules.sqlite")
    if action == "change":
        change(control)
    elif action == "create":
        print("ready", flush=True)
        sys.stdin.readline()
        for index in range(int(arguments[1])):
            mutate(control, "create", name=f"{arguments[0]}-{index}", **NEW)
    deployed = [in_code(each, "0 4 * * *") for each in CODE]
    found = control.resolve(deployed, owner=OWNER)
    print(json.dumps({each.name: [each.is_enabled, each.expression, each.args] for each in found}))


main()
