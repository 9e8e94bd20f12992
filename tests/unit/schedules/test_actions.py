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


def test_a_fire_is_enqueued(world):
    """A fire is submitted to its engine with the arguments and the queue that it came with, and answered by its token."""
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


def test_a_fire_happens_once(world):
    """A second command with the same fire id enqueues nothing, and is answered with what the first one did."""
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


def test_a_fire_that_failed_is_not_repeated(world):
    """What the first command failed with is the answer to the second one as well."""
    world.host.act = lambda *_: (_ for _ in ()).throw(ValueError("no broker"))
    for identity in ("c-1", "c-2"):
        world.fire(identity)
    assert len(world.host.calls) == 1
    first, second = (world.answered()[identity] for identity in ("c-1", "c-2"))
    assert first["error"] == second["error"] == "internal error: ValueError: no broker"
    assert second["result"]["deduplicated"] is True


def test_a_fire_that_is_being_enqueued(world):
    """A second command that comes while the first one runs waits for it, and not beyond its own time."""
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


def test_a_fire_that_a_crash_cut_short(world):
    """After a crash neither the same command nor another one enqueues a fire that was begun: both are indeterminate."""
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


def test_the_ledger_knows_a_fire_before_it_happens(world):
    """At the moment of the engine's call the fire is in the ledger as started, and afterwards as done."""
    seen = []
    world.host.act = lambda *_: (
        seen.append(world.disk.store.claim("fire:f-1", 0.0).state) or success()
    )
    world.fire("c-1")
    assert seen == [STARTED]
    assert world.disk.store.claim("fire:f-1", 0.0).state == DONE


def test_a_fire_that_outlives_the_agent(world):
    """A fire that ends after the agent has ended touches the store no more: it stays begun, for an heir to tell."""
    world.host.seconds = 30
    world.fire("c-1")
    world.dispatcher.stop()
    world.dispatcher.close()
    world.backend.advance(100)
    assert world.results == []
    assert world.disk.store.claim("fire:f-1", 0.0).state == STARTED


def test_a_fire_that_another_process_has(world):
    """What a living sibling has begun is left to it, and answered as unknown."""
    world.buffer._others = lambda _path, key: (
        LedgerEntry(key, IN_OTHER_PROCESS, b"", 0.0) if key.startswith("fire:") else None
    )
    world.disk.path = None
    world.fire("c-1")
    assert world.host.calls == []
    assert world.answered()["c-1"]["result"]["indeterminate"] is True


def test_a_fire_that_comes_too_late_is_not_claimed(world):
    """One whose time is up is refused and may come again: nothing has begun."""
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
def test_a_fire_that_cannot_be(world, changes, complaint):
    """A fire without a task or for an engine that is not here is a plain failure."""
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
def test_legacy_actions(world, action, call):
    """The actions of older databases reach the scheduler by the schedule's own id, and make it tell its schedules anew."""
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
def test_legacy_actions_that_cannot_be(world, parameters, target, complaint):
    """What names no schedule or no scheduler of ours is a failure that says so."""
    answer = world.run("schedule.disable", parameters, target=target)
    assert answer["status"] == "failed"
    assert complaint in answer["error"]


def test_what_a_scheduler_cannot(world):
    """An action without its capability does not reach the adapter."""
    world.scheduler.able = {"list"}
    answer = world.run("schedule.delete", {"schedule_id": KEY})
    assert (answer["error"], world.scheduler.calls) == (
        "scheduler beat does not support schedule.delete",
        [],
    )


def test_resync(world):
    """A resync answers how many schedulers have told their schedules."""
    world.stream.activate(world.brain.grant(), 60)
    assert world.run("schedule.resync", {})["result"] == {"schedulers_drained": 1, "skipped": {}}
    assert world.deliver() == ["activation", "command"]


def test_the_life_of_a_stream(world):
    """Activation, control and mutation run as commands; the snapshot or confirmation is stored before the answer."""
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


def test_an_operation_happens_once(world):
    """A mutation that is delivered under another command id gets the receipt of the first one."""
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


def test_an_agent_without_schedulers():
    """Without schedulers these actions are answered as what they are: nothing for this agent."""
    world = CommandHarness()
    answer = world.run("schedule.external.activate", StreamBrain().grant())
    assert (answer["status"], answer["error"]) == (
        "failed",
        "schedule.external.activate is not an action that this agent knows",
    )


def test_every_effect_with_an_id_is_an_action():
    """No entry of the table of ids is a misspelt action."""
    assert set(IDEMPOTENCY_KEYS) <= {*SCHEDULE_ACTIONS, "schedule.fire"}


def test_a_secret_in_a_schedule_does_not_leave_with_an_answer(world):
    """What an operation observed is answered as redacted as the row itself."""
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


def test_an_adapters_error_is_redacted(world):
    """What an adapter quotes of a connection does not leave with its error."""
    world.scheduler.disable_schedule = lambda _identity: (_ for _ in ()).throw(
        OSError("postgres://user:hunter2@db/x")
    )
    answer = world.run("schedule.disable", {"schedule_id": KEY})
    assert answer["status"] == "failed"
    assert "hunter2" not in answer["error"]
