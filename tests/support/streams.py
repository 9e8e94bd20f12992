"""What the brain makes of sequenced schedule streams (``brain-contract`` 5.7), written from the contract on z4j_core's terms."""

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

#: What a host reads of z4j_core's ``Config``.
CONFIG = SimpleNamespace(
    redaction_extra_key_patterns=(), redaction_extra_value_patterns=(), max_payload_bytes=8192
)
#: The key of the first schedule in :class:`Planned`.
KEY = "id:hourly"

STAMP = "2026-11-23T12:00:00Z"


def schedule(name="hourly", **fields):
    """A schedule as an adapter returns it."""
    return Schedule.model_validate_json(
        Schedule.model_construct(
            id=uuid4(), project_id=uuid4(), created_at=STAMP, updated_at=STAMP,
            **{
                "engine": "celery", "scheduler": "beat", "name": name, "task_name": "a.task", "kind": "interval", "expression": "3600",
                "external_id": f"id:{name}", **fields,
            },
        ).model_dump_json(warnings=False)
    )  # fmt: skip


class StubScheduler:
    """A scheduler adapter over a dictionary; every method is a coroutine, as in the real ones."""

    name = "beat"

    def __init__(self, *schedules):
        self.kept = {each.external_id: each for each in schedules}
        self.calls = []
        self.able = {
            "list", "enable", "disable", "trigger_now", "delete", "external_schedule_stable_snapshot_v1", "external_schedule_mutation_v1",
        }  # fmt: skip
        self.sink = None
        self.failure = None

    def connect_signals(self, sink):
        self.sink = sink

    def disconnect_signals(self):
        self.sink = None

    def capabilities(self):
        return self.able

    async def list_schedules(self):
        if self.failure is not None:
            raise self.failure
        return list(self.kept.values())

    async def get_schedule(self, identity):
        return self.kept.get(identity)

    async def enable_schedule(self, identity):
        return self._set(identity, "enable", is_enabled=True)

    async def disable_schedule(self, identity):
        return self._set(identity, "disable", is_enabled=False)

    async def trigger_now(self, identity):
        self.calls.append(("trigger_now", identity))
        return CommandResult(status="success", result={"schedule_id": identity})

    async def delete_schedule(self, identity):
        self.calls.append(("delete", identity))
        del self.kept[identity]
        return CommandResult(status="success")

    async def apply_external_mutation(self, *, operation, schedule_id, expected, definition):
        self.calls.append((operation, schedule_id, expected))
        if operation == "delete":
            del self.kept[schedule_id]
            return None
        made = (
            schedule(**definition)
            if operation == "create"
            else self.kept[schedule_id].model_copy(update=definition)
        )
        self.kept[made.external_id] = made
        return made

    def _set(self, identity, call, **changes):
        self.calls.append((call, identity))
        if identity not in self.kept:
            return CommandResult(status="failed", error="not found")
        self.kept[identity] = self.kept[identity].model_copy(update=changes)
        return CommandResult(status="success")


class StreamBrain:
    """The receiving end of one owner's streams: ``rows`` is what it knows, ``ignored`` what was of another epoch.

    ``hear`` raises ``AssertionError`` for whatever would fault the stream or drop an event.
    """

    def __init__(self, owner="beat"):
        self.owner = owner
        self.scope = external_schedule_source_scope(owner)
        self.stream = str(uuid4())
        self.epochs = 0
        self.rows = {}
        self.ignored = 0
        self.told = []
        self.redaction = RedactionEngine()

    def grant(self):
        """Begin an epoch; return the parameters of ``schedule.external.activate``."""
        self.epochs += 1
        self.sequence, self.frames = 0, []
        self.authority = {
            "stream_id": self.stream, "epoch_uuid": str(uuid4()), "epoch_number": self.epochs, "adapter_instance_id": str(uuid4()),
        }  # fmt: skip
        named = {
            "scheduler": self.owner,
            "owner": self.owner,
            "source_scope": self.scope,
            "stable_source": True,
        }
        return {
            **named,
            **self.authority,
            "registry_owner_id": str(uuid4()),
            "session_generation": 1,
        }

    def hear(self, event):
        """Take one event of a stream, in the order of the wire."""
        assert event["kind"].startswith("schedule.")
        assert self.redaction.scrub(event) == event
        assert (event["engine"], event["task_id"]) == (self.owner, "")
        data = dict(event["data"])
        body = data.get("external_snapshot_frame") or data.get("external_projection")
        if {name: body[name] for name in self.authority} != self.authority:
            self.ignored += 1
            return
        assert body["sequence"] == self.sequence + 1, "a gap, or something said twice"
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
        assert (
            len(
                {
                    (
                        frame["snapshot_id"],
                        frame["snapshot_digest"],
                        frame["row_count"],
                        frame["frame_count"],
                    )
                    for frame in frames
                }
            )
            == 1
        )
        rows = [row for frame in frames for row in frame["schedules"]]
        assert (len(rows), len(frames) - 1) == (body["row_count"], body["frame_count"])
        whole = external_projection_body(
            **self.authority, sequence=body["sequence"], kind="snapshot", owner=self.owner, source_scope=self.scope,
            schedules=rows, complete=True, stable_source=True,
        )  # fmt: skip
        assert whole["schedules"] == rows, "not in the order of their keys"
        assert external_projection_digest(whole) == body["snapshot_digest"]
        self.rows = {row["source_key"]: row for row in rows}
        self._accept(data["reason"])

    def _projection(self, body, data, event):
        assert not self.frames
        assert self.sequence, "the first one must be a snapshot"
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
        self.told.append(reason)

    def control(self, key, *, on):
        """Return the parameters of ``schedule.external.control``."""
        desired = {**self.rows[key], "is_enabled": on}
        return {
            **self.authority, "operation_id": str(uuid4()), "scheduler": self.owner, "schedule_id": key, "source_key": key,
            "z4j_schedule_id": str(uuid4()), "expected_accepted_sequence": self.sequence,
            "expected_projection_digest": external_projection_digest(self.rows[key]), "desired_projection": desired,
            "desired_projection_digest": external_projection_digest(desired), "registry_owner_id": str(uuid4()), "session_generation": 1,
        }  # fmt: skip

    def mutation(self, operation, key=None, **definition):
        """Return the parameters of ``schedule.external.mutate``."""
        return {
            **self.authority, "intent": {}, "operation_id": str(uuid4()), "scheduler": self.owner, "owner": self.owner, "operation": operation,
            "schedule_id": key, "definition": definition, "expected": self.rows.get(key), "source_scope": self.scope, "stable_source": True,
            "registry_owner_id": str(uuid4()), "session_generation": 1, "expected_accepted_sequence": self.sequence,
        }  # fmt: skip


class Direct:
    """A bridge for virtual time: every call takes ``seconds`` and then runs a coroutine that awaits nothing."""

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
        raise AssertionError("it awaits")


class Plans:
    """For a ``SessionHarness``: a room with one scheduler, and the brain at the other end of the store."""

    def plan(self, *schedules, interval=900):
        self.scheduler = StubScheduler(
            *(schedules or (schedule("hourly"), schedule("daily", is_enabled=False)))
        )
        self.bridge = Direct(self.backend)
        self.rings = 0
        self.room = ScheduleManager(
            [SchedulerHost(self.scheduler, self.bridge, CONFIG)],
            self.buffer,
            self.backend,
            self._ring,
            interval,
        )
        self.stream = self.room.streams["beat"]
        self.brain = StreamBrain()
        self.room.connect()

    def _ring(self):
        self.rings += 1

    def go(self):
        """Activate, and let the brain hear of it."""
        self.stream.activate(self.brain.grant(), 60)
        self.deliver()
        return self

    def run(self):
        """Start the room's loop."""
        self.stop_event = self.backend.event()
        self.task = self.backend.spawn(self.room.run, self.stop_event, name="z4j-schedules")

    def deliver(self):
        """Hand every projection stored to the brain; return the reasons of what it took."""
        before = len(self.brain.told)
        rows = self.disk.store.drain(0, 10_000, 10**9, (PROJECTION,))
        for row in rows:
            self.brain.hear(json.loads(row.payload))
        self.disk.store.confirm([row.id for row in rows])
        return self.brain.told[before:]


class Planned(SessionHarness, Plans):
    """A world with nothing but that room."""

    def __init__(self, *schedules, interval=900):
        super().__init__()
        self.plan(*schedules, interval=interval)
