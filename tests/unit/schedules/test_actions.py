"""Commands about schedules in virtual time: whom they reach, and that a fire happens once whatever command brings it."""

import json

import pytest

from tests.support.commands import CommandHarness
from tests.support.engines import success
from tests.support.streams import KEY, Plans, StreamBrain, schedule
from z4j_bare.buffer.rows import DONE, IN_OTHER_PROCESS, STARTED, LedgerEntry
from z4j_bare.commands import Dispatcher
from z4j_bare.commands.executor import IDEMPOTENCY_KEYS
from z4j_bare.schedules.actions import SCHEDULE_ACTIONS

FIRE = {
    "task_name": "a.task",
    "engine": "celery",
    "args": [1],
    "kwargs": {"x": 2},
    "queue": "q",
    "fire_id": "f-1",
    "schedule_id": "s-1",
}


class Scheduled(CommandHarness, Plans):
    """A dispatcher with an engine and the scheduler of ``Plans``."""

    def __init__(self):
        super().__init__(workers=8)

    def new_process(self):
        self.plan()
        self.dispatcher = Dispatcher(
            self.hosts,
            self.buffer,
            self.count_wakeup,
            self.backend,
            self.counters,
            self.workers,
            self.room,
        )

    def fire(self, identity, **changes):
        self.command(
            "schedule.fire", {**FIRE, **changes}, identity=identity, token=f"token-{identity}"
        )
        self.backend.advance(1)

    def answered(self):
        return dict(self.results)


@pytest.fixture
def world():
    return Scheduled()


def test_fire_submits_task_with_arguments_and_queue(world):
    """A fire command is submitted to its engine, and answered with its token."""
    world.host.act = lambda *_: success(task_id="t-1")
    world.fire("c-1")
    assert world.host.calls == [
        ("submit_task", ("a.task",), {"args": (1,), "kwargs": {"x": 2}, "queue": "q"})
    ]
    assert world.results == [
        (
            "c-1",
            {
                "status": "success",
                "result": {"task_id": "t-1"},
                "error": None,
                "delivery_claim_token": "token-c-1",
            },
        )
    ]


def test_fire_id_is_executed_once(world):
    """A second command with the same fire id enqueues nothing and gets the first one's result."""
    world.host.act = lambda *_: success(task_id="t-1")
    for identity in ("c-1", "c-2", "c-2"):
        world.fire(identity)
    assert len(world.host.calls) == 1
    again = {"task_id": "t-1", "deduplicated": True, "dedup_key": "fire:f-1"}
    assert [body["result"] for _, body in world.results] == [{"task_id": "t-1"}, again, again]
    assert [body["delivery_claim_token"] for _, body in world.results] == [
        "token-c-1",
        "token-c-2",
        "token-c-2",
    ]
    world.fire("c-3", fire_id="f-2")
    world.fire("c-4", fire_id=None)
    world.fire("c-5", fire_id=None)
    assert len(world.host.calls) == 4


def test_failed_fire_is_not_repeated(world):
    """The error of the first command is also the answer to the second one."""
    world.host.act = lambda *_: (_ for _ in ()).throw(ValueError("no broker"))
    for identity in ("c-1", "c-2"):
        world.fire(identity)
    assert len(world.host.calls) == 1
    first, second = (world.answered()[identity] for identity in ("c-1", "c-2"))
    assert first["error"] == second["error"] == "internal error: ValueError: no broker"
    assert second["result"]["deduplicated"] is True


def test_fire_waits_for_same_fire_id_within_deadline(world):
    """A second command waits for the running first one, but not beyond its own deadline."""
    world.host.seconds = 30
    world.fire("c-1")
    world.fire("c-2")
    world.command("schedule.fire", FIRE, identity="c-3", timeout=10)
    world.backend.advance(100)
    assert len(world.host.calls) == 1
    assert world.answered()["c-2"]["result"]["deduplicated"] is True
    assert world.answered()["c-3"]["result"] == {
        "indeterminate": True,
        "operation": "schedule.fire",
    }


def test_fire_interrupted_by_crash_is_indeterminate(world):
    """After a crash no command enqueues a started fire again. The results are indeterminate."""
    world.host.seconds = 1000
    world.fire("c-1")
    assert world.disk.store.claim("fire:f-1", 0.0).state == STARTED
    world.new_process()
    world.host.seconds = 0
    for identity in ("c-1", "c-2"):
        world.fire(identity)
    assert len(world.host.calls) == 1
    for identity in ("c-1", "c-2"):
        body = world.answered()[identity]
        assert (body["status"], body["result"]["indeterminate"]) == ("failed", True)


def test_fire_is_in_ledger_before_engine_call(world):
    """A fire is started in the ledger when the engine is called, and done afterwards."""
    seen = []
    world.host.act = lambda *_: (
        seen.append(world.disk.store.claim("fire:f-1", 0.0).state) or success()
    )
    world.fire("c-1")
    assert seen == [STARTED]
    assert world.disk.store.claim("fire:f-1", 0.0).state == DONE


def test_fire_ending_after_agent_stays_started(world):
    """A fire that ends after the agent does not touch the store and stays started."""
    world.host.seconds = 30
    world.fire("c-1")
    world.dispatcher.stop()
    world.dispatcher.close()
    world.backend.advance(100)
    assert world.results == []
    assert world.disk.store.claim("fire:f-1", 0.0).state == STARTED


def test_fire_of_other_process_is_indeterminate(world):
    """A fire that another living process has started is not executed here."""
    world.buffer._others = lambda _path, key: (
        LedgerEntry(key, IN_OTHER_PROCESS, b"", 0.0) if key.startswith("fire:") else None
    )
    world.disk.path = None
    world.fire("c-1")
    assert world.host.calls == []
    assert world.answered()["c-1"]["result"]["indeterminate"] is True


def test_late_fire_is_not_claimed(world):
    """A fire after its deadline is rejected and can be sent again, because nothing was started."""
    world.command("schedule.fire", FIRE, identity="c-1", delay=100)
    world.backend.advance(1)
    assert "was not started" in world.answered()["c-1"]["error"]
    world.fire("c-2")
    assert len(world.host.calls) == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task_name": None}, "task_name is required"),
        ({"engine": "rq"}, "no engine 'rq'"),
        ({"args": "x"}, "args must be a list"),
        ({"queue": 3}, "queue must be text"),
    ],
)
def test_invalid_fire_fails(world, changes, complaint):
    """A fire without a task, for an unknown engine or with invalid arguments fails."""
    world.fire("c-1", **changes)
    assert complaint in world.answered()["c-1"]["error"]
    assert world.answered()["c-1"]["result"] is None
    assert world.host.calls == []


@pytest.mark.parametrize(
    ("action", "call"),
    [
        ("enable", "enable"),
        ("disable", "disable"),
        ("trigger_now", "trigger_now"),
        ("delete", "delete"),
    ],
)
def test_plain_schedule_action_calls_scheduler(world, action, call):
    """The plain actions call the scheduler with the schedule's own id and request a snapshot."""
    answer = world.run(
        f"schedule.{action}",
        {"schedule_id": "hourly", "external_id": KEY},
        target={"id": "a uuid", "scheduler": "beat"},
    )
    assert (answer["status"], world.scheduler.calls) == ("success", [(call, KEY)])
    assert world.stream.changed


@pytest.mark.parametrize(
    ("parameters", "target", "complaint"),
    [
        ({"schedule_id": "none"}, {}, "not found"),
        ({}, {}, "schedule_id is required"),
        ({"schedule_id": KEY}, {"scheduler": "cron"}, "no scheduler 'cron', only beat"),
        (
            {"schedule_id": KEY, "scheduler": "beat"},
            {"scheduler": "cron"},
            "'beat' in the parameters and 'cron' in the target",
        ),
        ({"schedule_id": KEY, "scheduler": 3}, {}, "scheduler must be text"),
    ],
)
def test_plain_schedule_action_reports_bad_target(world, parameters, target, complaint):
    """An action without a known schedule or scheduler fails with a text that says so."""
    answer = world.run("schedule.disable", parameters, target=target)
    assert answer["status"] == "failed"
    assert complaint in answer["error"]


def test_action_without_capability_is_rejected(world):
    """An action without its capability does not reach the adapter."""
    world.scheduler.able = {"list"}
    answer = world.run("schedule.delete", {"schedule_id": KEY})
    assert (answer["error"], world.scheduler.calls) == (
        "scheduler beat does not support schedule.delete",
        [],
    )


def test_resync_reports_published_schedulers(world):
    """A resync reports how many schedulers were published."""
    world.stream.activate(world.brain.grant(), 60)
    assert world.run("schedule.resync", {})["result"] == {"schedulers_drained": 1, "skipped": {}}
    assert world.deliver() == ["activation", "command"]


def test_stream_commands_store_projection_before_result(world):
    """Activation, control and mutation store their projection before their result."""
    for identity, make in enumerate(
        (
            world.brain.grant,
            lambda: world.brain.control(KEY, on=False),
            lambda: world.brain.mutation("trigger", KEY),
        )
    ):
        action = ("activate", "control", "mutate")[identity]
        world.command(
            f"schedule.external.{action}",
            make(),
            identity=f"c-{identity}",
            target={"type": "scheduler", "scheduler": "beat"},
            token="t",
        )
        world.backend.advance(1)
        assert len(world.deliver()) == 1
    assert [body["status"] for _, body in world.results] == ["success"] * 3
    assert {body["delivery_claim_token"] for _, body in world.results} == {"t"}
    assert world.brain.rows[KEY]["is_enabled"] is False


def test_operation_id_is_executed_once(world):
    """A mutation that arrives under another command id gets the result of the first one."""
    world.go()
    asked = world.brain.mutation("trigger", KEY)
    for identity in ("c-1", "c-2"):
        world.command("schedule.external.mutate", asked, identity=identity)
        world.backend.advance(1)
    assert world.scheduler.calls == [("trigger_now", KEY)]
    receipt = world.answered()["c-1"]["result"]
    assert world.answered()["c-2"]["result"] == {
        **receipt,
        "deduplicated": True,
        "dedup_key": f"operation:{asked['operation_id']}",
    }


def test_agent_without_scheduler_rejects_schedule_actions():
    """Without schedulers these actions are unknown."""
    world = CommandHarness()
    answer = world.run("schedule.external.activate", StreamBrain().grant())
    assert (answer["status"], answer["error"]) == (
        "failed",
        "schedule.external.activate is not an action that this agent knows",
    )


def test_idempotency_keys_name_known_actions():
    """Every action with an idempotency key exists."""
    assert set(IDEMPOTENCY_KEYS) <= {*SCHEDULE_ACTIONS, "schedule.fire"}


def test_result_is_redacted_like_row(world):
    """The configuration in an operation's result is redacted like the row."""
    world.scheduler.kept = {
        KEY: schedule("hourly", args=["x" * 9000], kwargs={"api_key": "hunter2"})
    }
    world.go()
    world.command("schedule.external.mutate", world.brain.mutation("trigger", KEY), identity="c-1")
    world.backend.advance(1)
    world.deliver()
    observed = world.answered()["c-1"]["result"]["observed_configuration"]
    assert observed.items() <= world.brain.rows[KEY].items()
    assert observed["kwargs"] == {"api_key": "[REDACTED]"}
    assert "hunter2" not in json.dumps(world.answered())


def test_adapter_error_is_redacted(world):
    """A connection string in an adapter's error is redacted."""
    world.scheduler.disable_schedule = lambda _identity: (_ for _ in ()).throw(
        OSError("postgres://user:hunter2@db/x")
    )
    answer = world.run("schedule.disable", {"schedule_id": KEY})
    assert answer["status"] == "failed"
    assert "hunter2" not in answer["error"]
