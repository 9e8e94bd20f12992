"""The brain's side of schedule streams, a stub scheduler, and a harness in virtual time."""

import json
from types import SimpleNamespace
from uuid import uuid4

from z4j_core.models import CommandResult, Schedule
from z4j_core.redaction.engine import RedactionEngine
from z4j_core.schedule_external import (
    external_projection_body,
    external_projection_digest,
    external_schedule_source_scope,
    external_snapshot_frame_body,
    external_snapshot_frame_digest,
)

from tests.support.session import SessionHarness
from z4j_bare.buffer.rows import PROJECTION
from z4j_bare.schedules import ScheduleManager
from z4j_bare.schedules.host import SchedulerHost

#: The fields of z4j_core's ``Config`` that a scheduler host reads.
CONFIG = SimpleNamespace(
    redaction_extra_key_patterns=(), redaction_extra_value_patterns=(), max_payload_bytes=8192
)
#: The key of the first schedule in :class:`ScheduleHarness`.
KEY = "id:hourly"

STAMP = "2026-11-23T12:00:00Z"


def schedule(name="hourly", **fields):
    """Return a schedule as an adapter would."""
    return Schedule.model_validate_json(
        Schedule.model_construct(
            id=uuid4(),
            project_id=uuid4(),
            created_at=STAMP,
            updated_at=STAMP,
            **{
                "engine": "celery",
                "scheduler": "beat",
                "name": name,
                "task_name": "a.task",
                "kind": "interval",
                "expression": "3600",
                "external_id": f"id:{name}",
                **fields,
            },
        ).model_dump_json(warnings=False)
    )


class StubScheduler:
    """A scheduler adapter whose schedules are in a dictionary. ``calls`` records the changes."""

    name = "beat"

    def __init__(self, *schedules):
        self.schedules = {item.external_id: item for item in schedules}
        self.calls = []
        self.capability_names = {
            "list",
            "enable",
            "disable",
            "trigger_now",
            "delete",
            "external_schedule_stable_snapshot_v1",
            "external_schedule_mutation_v1",
        }
        self.sink = None
        self.failure = None

    def connect_signals(self, sink):
        self.sink = sink

    def disconnect_signals(self):
        self.sink = None

    def capabilities(self):
        return self.capability_names

    async def list_schedules(self):
        if self.failure is not None:
            raise self.failure
        return list(self.schedules.values())

    async def get_schedule(self, identity):
        return self.schedules.get(identity)

    async def enable_schedule(self, identity):
        return self._set(identity, "enable", is_enabled=True)

    async def disable_schedule(self, identity):
        return self._set(identity, "disable", is_enabled=False)

    async def trigger_now(self, identity):
        self.calls.append(("trigger_now", identity))
        return CommandResult(status="success", result={"schedule_id": identity})

    async def delete_schedule(self, identity):
        self.calls.append(("delete", identity))
        del self.schedules[identity]
        return CommandResult(status="success")

    async def apply_external_mutation(self, *, operation, schedule_id, expected, definition):
        self.calls.append((operation, schedule_id, expected))
        if operation == "delete":
            del self.schedules[schedule_id]
            return None
        made = (
            schedule(**definition)
            if operation == "create"
            else self.schedules[schedule_id].model_copy(update=definition)
        )
        self.schedules[made.external_id] = made
        return made

    def _set(self, identity, call, **changes):
        self.calls.append((call, identity))
        if identity not in self.schedules:
            return CommandResult(status="failed", error="not found")
        self.schedules[identity] = self.schedules[identity].model_copy(update=changes)
        return CommandResult(status="success")


class StreamBrain:
    """The brain's side of one owner's stream.

    ``rows`` has the accepted schedules by key, and ``ignored`` counts events of other epochs.
    ``receive_event`` raises ``AssertionError`` for an event that the brain would reject.
    """

    def __init__(self, owner="beat"):
        self.owner = owner
        self.scope = external_schedule_source_scope(owner)
        self.stream = str(uuid4())
        self.epochs = 0
        self.rows = {}
        self.ignored = 0
        self.published_reasons = []
        self.redaction = RedactionEngine()

    def grant(self):
        """Start an epoch; return the parameters of ``schedule.external.activate``."""
        self.epochs += 1
        self.sequence, self.frames = 0, []
        self.authority = {
            "stream_id": self.stream,
            "epoch_uuid": str(uuid4()),
            "epoch_number": self.epochs,
            "adapter_instance_id": str(uuid4()),
        }
        target = {
            "scheduler": self.owner,
            "owner": self.owner,
            "source_scope": self.scope,
            "stable_source": True,
        }
        return {
            **target,
            **self.authority,
            "registry_owner_id": str(uuid4()),
            "session_generation": 1,
        }

    def receive_event(self, event):
        """Receive one event of a stream, in the order of sending."""
        assert event["kind"].startswith("schedule.")
        assert self.redaction.scrub(event) == event
        assert (event["engine"], event["task_id"]) == (self.owner, "")
        data = dict(event["data"])
        body = data.get("external_snapshot_frame") or data.get("external_projection")
        if {name: body[name] for name in self.authority} != self.authority:
            self.ignored += 1
            return
        assert body["sequence"] == self.sequence + 1, "a gap or a repeated number"
        if "external_snapshot_frame" in data:
            self._frame(body, data)
        else:
            self._projection(body, data, event)

    def _frame(self, body, data):
        names = body.keys() - {"protocol_version"}
        assert external_snapshot_frame_body(**{name: body[name] for name in names}) == body
        assert external_snapshot_frame_digest(body) == data["frame_digest"]
        self.frames.append(body)
        assert [frame["frame_index"] for frame in self.frames] == list(range(len(self.frames)))
        if body["frame_kind"] == "rows":
            return
        frames, self.frames = self.frames, []
        common = ("snapshot_id", "snapshot_digest", "row_count", "frame_count")
        assert len({tuple(frame[name] for name in common) for frame in frames}) == 1
        rows = [row for frame in frames for row in frame["schedules"]]
        assert (len(rows), len(frames) - 1) == (body["row_count"], body["frame_count"])
        snapshot = external_projection_body(
            **self.authority,
            sequence=body["sequence"],
            kind="snapshot",
            owner=self.owner,
            source_scope=self.scope,
            schedules=rows,
            complete=True,
            stable_source=True,
        )
        assert snapshot["schedules"] == rows, "rows are not sorted by key"
        assert external_projection_digest(snapshot) == body["snapshot_digest"]
        self.rows = {row["source_key"]: row for row in rows}
        self._accept(data["reason"])

    def _projection(self, body, data, event):
        assert not self.frames
        assert self.sequence, "the first projection must be a snapshot"
        names = body.keys() - {"protocol_version"}
        assert external_projection_body(**{name: body[name] for name in names}) == body
        assert external_projection_digest(body) == data["payload_digest"]
        assert (event["kind"], body["kind"], body["complete"]) == (
            "schedule.updated",
            "control",
            False,
        )
        (row,) = body["schedules"]
        self.rows[row["source_key"]] = row
        self._accept(data["reason"])

    def _accept(self, reason):
        self.sequence += 1
        self.published_reasons.append(reason)

    def control(self, key, *, on):
        """Return the parameters of ``schedule.external.control``."""
        desired = {**self.rows[key], "is_enabled": on}
        return {
            **self.authority,
            "operation_id": str(uuid4()),
            "scheduler": self.owner,
            "schedule_id": key,
            "source_key": key,
            "z4j_schedule_id": str(uuid4()),
            "expected_accepted_sequence": self.sequence,
            "expected_projection_digest": external_projection_digest(self.rows[key]),
            "desired_projection": desired,
            "desired_projection_digest": external_projection_digest(desired),
            "registry_owner_id": str(uuid4()),
            "session_generation": 1,
        }

    def mutation(self, operation, key=None, **definition):
        """Return the parameters of ``schedule.external.mutate``."""
        return {
            **self.authority,
            "intent": {},
            "operation_id": str(uuid4()),
            "scheduler": self.owner,
            "owner": self.owner,
            "operation": operation,
            "schedule_id": key,
            "definition": definition,
            "expected": self.rows.get(key),
            "source_scope": self.scope,
            "stable_source": True,
            "registry_owner_id": str(uuid4()),
            "session_generation": 1,
            "expected_accepted_sequence": self.sequence,
        }


class VirtualBridge:
    """A bridge in virtual time: each call takes ``seconds`` and runs a coroutine without awaits."""

    def __init__(self, backend):
        self.backend = backend
        self.seconds = 0.0

    def call(self, function, *args, timeout, **kwargs):
        seconds = self.seconds
        self.backend.sleep(min(seconds, timeout))
        if seconds > timeout:
            raise TimeoutError
        outcome = function(*args, **kwargs)
        if not hasattr(outcome, "send"):
            return outcome
        try:
            outcome.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("the coroutine awaits")


class ScheduleFixture:
    """Adds to a harness a manager with one scheduler, and the brain's side of its stream."""

    def set_up_schedules(self, *schedules, interval=900):
        self.scheduler = StubScheduler(
            *(schedules or (schedule("hourly"), schedule("daily", is_enabled=False)))
        )
        self.bridge = VirtualBridge(self.backend)
        self.wakeups = 0
        self.manager = ScheduleManager(
            [SchedulerHost(self.scheduler, self.bridge, CONFIG)],
            self.buffer,
            self.backend,
            self._count_wakeup,
            interval,
        )
        self.stream = self.manager.streams["beat"]
        self.brain = StreamBrain()
        self.manager.connect()

    def _count_wakeup(self):
        self.wakeups += 1

    def activate(self):
        """Activate the stream and deliver the snapshot."""
        self.stream.activate(self.brain.grant(), 60)
        self.deliver()
        return self

    def start(self):
        """Start the manager's loop."""
        self.stop_event = self.backend.event()
        self.task = self.backend.spawn(self.manager.run, self.stop_event, name="z4j-schedules")

    def deliver(self):
        """Deliver all stored projections to the brain; return the reasons of the accepted ones."""
        before = len(self.brain.published_reasons)
        rows = self.disk.store.drain(0, 10_000, 10**9, (PROJECTION,))
        for row in rows:
            self.brain.receive_event(json.loads(row.payload))
        self.disk.store.confirm([row.id for row in rows])
        return self.brain.published_reasons[before:]


class ScheduleHarness(SessionHarness, ScheduleFixture):
    """A session harness with a schedule manager."""

    def __init__(self, *schedules, interval=900):
        super().__init__()
        self.set_up_schedules(*schedules, interval=interval)
