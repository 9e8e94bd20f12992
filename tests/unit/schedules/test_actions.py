"""Schedule commands in virtual time: their targets, and idempotency by fire id."""

import json

import pytest

from tests.support.commands import CommandHarness
from tests.support.engines import success
from tests.support.streams import KEY, ScheduleFixture, StreamBrain, schedule
from z4j_bare.buffer.rows import DONE, IN_OTHER_PROCESS, STARTED, LedgerEntry
from z4j_bare.commands import Dispatcher
from z4j_bare.commands.executor import IDEMPOTENCY_KEYS
from z4j_bare.schedules.actions import SCHEDULE_ACTIONS
from z4j_bare.wire.command import CommandOutcome

FIRE = {
    "task_name": "a.task",
    "engine": "celery",
    "args": [1],
    "kwargs": {"x": 2},
    "queue": "q",
    "fire_id": "f-1",
    "schedule_id": "s-1",
}


class ScheduleCommandHarness(CommandHarness, ScheduleFixture):
    """A dispatcher with one engine and one scheduler."""

    def __init__(self):
        super().__init__(workers=8)

    def new_process(self):
        self.set_up_schedules()
        self.dispatcher = Dispatcher(
            self.hosts,
            self.buffer,
            self.count_wakeup,
            self.backend,
            self.counters,
            self.workers,
            self.manager,
        )

    def fire(self, identity, **changes):
        self.command(
            "schedule.fire", {**FIRE, **changes}, identity=identity, token=f"token-{identity}"
        )
        self.backend.advance(1)

    def results_by_id(self):
        return dict(self.results)


@pytest.fixture
def harness():
    return ScheduleCommandHarness()


def test_fire_submits_task_with_arguments_and_queue(harness):
    """A fire command is submitted to its engine, and answered with its token."""
    harness.host.act = lambda *_: success(task_id="t-1")
    harness.fire("c-1")
    assert harness.host.calls == [
        ("submit_task", ("a.task",), {"args": (1,), "kwargs": {"x": 2}, "queue": "q"})
    ]
    assert harness.results == [
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


def test_fire_id_is_executed_once(harness):
    """A second command with the same fire id enqueues nothing and gets the first one's result."""
    harness.host.act = lambda *_: success(task_id="t-1")
    for identity in ("c-1", "c-2", "c-2"):
        harness.fire(identity)
    assert len(harness.host.calls) == 1
    again = {"task_id": "t-1", "deduplicated": True, "dedup_key": "fire:f-1"}
    assert [body["result"] for _, body in harness.results] == [{"task_id": "t-1"}, again, again]
    assert [body["delivery_claim_token"] for _, body in harness.results] == [
        "token-c-1",
        "token-c-2",
        "token-c-2",
    ]
    harness.fire("c-3", fire_id="f-2")
    harness.fire("c-4", fire_id=None)
    harness.fire("c-5", fire_id=None)
    assert len(harness.host.calls) == 4


def test_failed_fire_is_tried_again(harness):
    """A second command for a failed fire is executed; after a success no further one is."""
    harness.host.act = lambda *_: (_ for _ in ()).throw(ValueError("no broker"))
    for identity in ("c-1", "c-2", "c-2"):
        harness.fire(identity)
    assert len(harness.host.calls) == 2
    first, second = (harness.results_by_id()[identity] for identity in ("c-1", "c-2"))
    assert first["error"] == second["error"] == "internal error: ValueError: no broker"
    assert harness.disk.store.claim("unknown", 0.0) is None
    harness.host.act = lambda *_: success(task_id="t-1")
    harness.fire("c-3")
    harness.fire("c-4")
    assert len(harness.host.calls) == 3
    third, fourth = (harness.results_by_id()[identity] for identity in ("c-3", "c-4"))
    assert third["result"] == {"task_id": "t-1"}
    assert fourth["result"]["deduplicated"] is True


def test_failed_fire_is_tried_again_by_next_process(harness):
    """The next process also executes a command for a fire that failed."""
    harness.host.act = lambda *_: (_ for _ in ()).throw(ValueError("no broker"))
    harness.fire("c-1")
    harness.new_process()
    harness.host.act = lambda *_: success(task_id="t-1")
    harness.fire("c-2")
    assert harness.results_by_id()["c-2"]["result"] == {"task_id": "t-1"}


def test_fire_that_fails_again_in_crash_is_indeterminate(harness):
    """A second try that a crash interrupts is not repeated, although the first one had failed."""
    harness.host.act = lambda *_: (_ for _ in ()).throw(ValueError("no broker"))
    harness.fire("c-1")
    harness.host.act, harness.host.seconds = (lambda *_: success(task_id="t-1")), 1000
    harness.fire("c-2")
    harness.new_process()
    harness.host.seconds = 0
    calls = len(harness.host.calls)
    harness.fire("c-3")
    assert len(harness.host.calls) == calls
    assert harness.results_by_id()["c-3"]["result"]["indeterminate"] is True


@pytest.mark.parametrize(
    "returned",
    [CommandOutcome.indeterminate("schedule.fire", "timed out"), "no result at all", None],
)
def test_fire_with_unknown_outcome_is_not_repeated(harness, returned):
    """A fire that may have been enqueued is not tried again."""
    harness.host.act = lambda *_: returned
    for identity in ("c-1", "c-2"):
        harness.fire(identity)
    assert len(harness.host.calls) == 1
    second = harness.results_by_id()["c-2"]["result"]
    assert (second["indeterminate"], second["deduplicated"]) == (True, True)


def test_fire_waits_for_same_fire_id_within_deadline(harness):
    """A second command waits for the running first one, but not beyond its own deadline."""
    harness.host.seconds = 30
    harness.fire("c-1")
    harness.fire("c-2")
    harness.command("schedule.fire", FIRE, identity="c-3", timeout=10)
    harness.backend.advance(100)
    assert len(harness.host.calls) == 1
    assert harness.results_by_id()["c-2"]["result"]["deduplicated"] is True
    assert harness.results_by_id()["c-3"]["result"] == {
        "indeterminate": True,
        "operation": "schedule.fire",
    }


def test_fire_interrupted_by_crash_is_indeterminate(harness):
    """After a crash no command enqueues a started fire again. The results are indeterminate."""
    harness.host.seconds = 1000
    harness.fire("c-1")
    assert harness.disk.store.claim("fire:f-1", 0.0).state == STARTED
    harness.new_process()
    harness.host.seconds = 0
    for identity in ("c-1", "c-2"):
        harness.fire(identity)
    assert len(harness.host.calls) == 1
    for identity in ("c-1", "c-2"):
        body = harness.results_by_id()[identity]
        assert (body["status"], body["result"]["indeterminate"]) == ("failed", True)


def test_fire_is_in_ledger_before_engine_call(harness):
    """A fire is started in the ledger when the engine is called, and done afterwards."""
    seen = []
    harness.host.act = lambda *_: (
        seen.append(harness.disk.store.claim("fire:f-1", 0.0).state) or success()
    )
    harness.fire("c-1")
    assert seen == [STARTED]
    assert harness.disk.store.claim("fire:f-1", 0.0).state == DONE


def test_fire_ending_after_agent_stays_started(harness):
    """A fire that ends after the agent does not touch the store and stays started."""
    harness.host.seconds = 30
    harness.fire("c-1")
    harness.dispatcher.stop()
    harness.dispatcher.close()
    harness.backend.advance(100)
    assert harness.results == []
    assert harness.disk.store.claim("fire:f-1", 0.0).state == STARTED


def test_fire_of_other_process_is_indeterminate(harness):
    """A fire that another living process has started is not executed here."""
    claim = harness.buffer.claim
    harness.buffer.claim = lambda key, provisional_result=b"": (
        LedgerEntry(key, IN_OTHER_PROCESS, b"", 0.0)
        if key.startswith("fire:")
        else claim(key, provisional_result)
    )
    harness.fire("c-1")
    assert harness.host.calls == []
    assert harness.results_by_id()["c-1"]["result"]["indeterminate"] is True


def test_late_fire_is_not_claimed(harness):
    """A fire after its deadline is rejected and can be sent again, because nothing was started."""
    harness.command("schedule.fire", FIRE, identity="c-1", delay=100)
    harness.backend.advance(1)
    assert "was not started" in harness.results_by_id()["c-1"]["error"]
    harness.fire("c-2")
    assert len(harness.host.calls) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_name": None}, "task_name is required"),
        ({"engine": "rq"}, "no engine 'rq'"),
        ({"args": "x"}, "args must be a list"),
        ({"queue": 3}, "queue must be text"),
    ],
)
def test_invalid_fire_fails(harness, changes, message):
    """A fire without a task, for an unknown engine or with invalid arguments fails."""
    harness.fire("c-1", **changes)
    assert message in harness.results_by_id()["c-1"]["error"]
    assert harness.results_by_id()["c-1"]["result"] is None
    assert harness.host.calls == []


@pytest.mark.parametrize(
    ("action", "call"),
    [
        ("enable", "enable"),
        ("disable", "disable"),
        ("trigger_now", "trigger_now"),
        ("delete", "delete"),
    ],
)
def test_plain_schedule_action_calls_scheduler(harness, action, call):
    """The plain actions call the scheduler with the schedule's own id and request a snapshot."""
    result = harness.run(
        f"schedule.{action}",
        {"schedule_id": "hourly", "external_id": KEY},
        target={"id": "a uuid", "scheduler": "beat"},
    )
    assert (result["status"], harness.scheduler.calls) == ("success", [(call, KEY)])
    assert harness.stream.changed


@pytest.mark.parametrize(
    ("parameters", "target", "message"),
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
def test_plain_schedule_action_reports_bad_target(harness, parameters, target, message):
    """An action without a known schedule or scheduler fails with a text that says so."""
    result = harness.run("schedule.disable", parameters, target=target)
    assert result["status"] == "failed"
    assert message in result["error"]


def test_action_without_capability_is_rejected(harness):
    """An action without its capability does not reach the adapter."""
    harness.scheduler.capability_names = {"list"}
    result = harness.run("schedule.delete", {"schedule_id": KEY})
    assert (result["error"], harness.scheduler.calls) == (
        "scheduler beat does not support schedule.delete",
        [],
    )


def test_resync_reports_published_schedulers(harness):
    """A resync reports how many schedulers were published."""
    harness.stream.activate(harness.brain.grant(), 60)
    assert harness.run("schedule.resync", {})["result"] == {"schedulers_drained": 1, "skipped": {}}
    assert harness.deliver() == ["activation", "command"]


def test_stream_commands_store_projection_before_result(harness):
    """Activation, control and mutation store their projection before their result."""
    for identity, make in enumerate(
        (
            harness.brain.grant,
            lambda: harness.brain.control(KEY, on=False),
            lambda: harness.brain.mutation("trigger", KEY),
        )
    ):
        action = ("activate", "control", "mutate")[identity]
        harness.command(
            f"schedule.external.{action}",
            make(),
            identity=f"c-{identity}",
            target={"type": "scheduler", "scheduler": "beat"},
            token="t",
        )
        harness.backend.advance(1)
        assert len(harness.deliver()) == 1
    assert [body["status"] for _, body in harness.results] == ["success"] * 3
    assert {body["delivery_claim_token"] for _, body in harness.results} == {"t"}
    assert harness.brain.rows[KEY]["is_enabled"] is False


def test_operation_id_is_executed_once(harness):
    """A mutation that arrives under another command id gets the result of the first one."""
    harness.activate()
    parameters = harness.brain.mutation("trigger", KEY)
    for identity in ("c-1", "c-2"):
        harness.command("schedule.external.mutate", parameters, identity=identity)
        harness.backend.advance(1)
    assert harness.scheduler.calls == [("trigger_now", KEY)]
    receipt = harness.results_by_id()["c-1"]["result"]
    assert harness.results_by_id()["c-2"]["result"] == {
        **receipt,
        "deduplicated": True,
        "dedup_key": f"operation:{parameters['operation_id']}",
    }


def test_agent_without_scheduler_rejects_schedule_actions():
    """Without schedulers these actions are unknown."""
    harness = CommandHarness()
    result = harness.run("schedule.external.activate", StreamBrain().grant())
    assert (result["status"], result["error"]) == (
        "failed",
        "schedule.external.activate is not an action that this agent knows",
    )


def test_idempotency_keys_name_known_actions():
    """Every action with an idempotency key exists."""
    assert set(IDEMPOTENCY_KEYS) <= {*SCHEDULE_ACTIONS, "schedule.fire"}


def test_result_is_redacted_like_row(harness):
    """The configuration in an operation's result is redacted like the row."""
    harness.scheduler.schedules = {
        KEY: schedule("hourly", args=["x" * 9000], kwargs={"api_key": "hunter2"})
    }
    harness.activate()
    harness.command(
        "schedule.external.mutate", harness.brain.mutation("trigger", KEY), identity="c-1"
    )
    harness.backend.advance(1)
    harness.deliver()
    observed = harness.results_by_id()["c-1"]["result"]["observed_configuration"]
    assert observed.items() <= harness.brain.rows[KEY].items()
    assert observed["kwargs"] == {"api_key": "[REDACTED]"}
    assert "hunter2" not in json.dumps(harness.results_by_id())


def test_adapter_error_is_redacted(harness):
    """A connection string in an adapter's error is redacted."""
    harness.scheduler.disable_schedule = lambda _identity: (_ for _ in ()).throw(
        OSError("postgres://user:hunter2@db/x")
    )
    result = harness.run("schedule.disable", {"schedule_id": KEY})
    assert result["status"] == "failed"
    assert "hunter2" not in result["error"]
