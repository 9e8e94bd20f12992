"""Streams in virtual time: order, epochs and operations, checked by the brain's rules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from z4j_core.errors import ConflictError
from z4j_core.models import CommandResult

from tests.support.streams import KEY, ScheduleHarness, StreamBrain, schedule
from z4j_bare.errors import CommandError
from z4j_bare.schedules import operations
from z4j_bare.schedules.manager import DEBOUNCE


@pytest.fixture
def harness():
    return ScheduleHarness()


def test_inactive_stream_publishes_nothing(harness):
    """Before an activation neither signals, nor the interval, nor a resync publish anything."""
    harness.start()
    harness.scheduler.sink("created", None)
    harness.backend.advance(2000)
    assert harness.manager.resync(10) == {
        "schedulers_drained": 0,
        "skipped": {"beat": "the brain has not asked this process for its schedules"},
    }
    assert harness.deliver() == []
    assert harness.buffer.stats().rows == 0


def test_activation_stores_snapshot_before_result(harness):
    """The result of an activation has its counts, and the snapshot is stored by then."""
    parameters = harness.brain.grant()
    result = harness.stream.activate(parameters, 60)
    assert result == {
        "scheduler": "beat",
        **harness.brain.authority,
        "sequence": 1,
        "schedule_count": 2,
        "frame_count": 2,
    }
    assert (harness.deliver(), harness.wakeups) == (["activation"], 1)
    assert {key: row["is_enabled"] for key, row in harness.brain.rows.items()} == {
        KEY: True,
        "id:daily": False,
    }


def test_repeated_activation_publishes_again(harness):
    """The same activation again publishes a second snapshot with the next number."""
    parameters = harness.brain.grant()
    assert [harness.stream.activate(parameters, 60)["sequence"] for _ in range(2)] == [1, 2]
    assert harness.deliver() == ["activation"] * 2


def test_older_epoch_is_rejected(harness):
    """A late activation of the previous session is rejected. Another stream starts from 1."""
    late, parameters = harness.brain.grant(), harness.brain.grant()
    harness.stream.activate(parameters, 60)
    with pytest.raises(CommandError, match="epoch 1 of beat is over"):
        harness.stream.activate(late, 60)
    assert harness.stream.snapshot("test")
    assert harness.deliver() == ["activation", "test"]
    harness.brain = StreamBrain()
    harness.activate()
    assert harness.brain.published_reasons == ["activation"]


@pytest.mark.parametrize(
    "changes", [{"owner": "other"}, {"stable_source": False}, {"stable_source": None}]
)
def test_activation_needs_owner_and_stable_source(harness, changes):
    """An activation for another owner or without a stable source is rejected."""
    with pytest.raises(CommandError, match="stable source"):
        harness.stream.activate({**harness.brain.grant(), **changes}, 60)
    assert harness.stream.authority is None


def test_failed_listing_publishes_nothing(harness):
    """A failed listing activates nothing and deletes nothing. The next listing publishes."""
    harness.scheduler.failure = OSError("no database")
    with pytest.raises(OSError, match="no database"):
        harness.stream.activate(harness.brain.grant(), 60)
    assert harness.stream.authority is None
    harness.scheduler.failure = None
    harness.activate().start()
    harness.scheduler.failure = OSError("no database")
    harness.backend.advance(901)
    assert harness.deliver() == []
    harness.scheduler.failure = None
    harness.backend.advance(901)
    assert harness.deliver() == ["periodic"]


def test_signals_are_debounced(harness):
    """A hundred signals cause one snapshot, which ignores the schedules in the signals."""
    harness.activate().start()
    harness.scheduler.schedules["id:new"] = schedule("new")
    for _ in range(100):
        harness.scheduler.sink("created", None)
    harness.backend.advance(10)
    assert harness.deliver() == ["signal"]
    assert "id:new" in harness.brain.rows


def test_change_during_snapshot_causes_next_snapshot(harness):
    """A change during a listing is published by the next snapshot."""
    harness.activate().start()
    harness.bridge.seconds = 5
    harness.scheduler.sink("updated", None)
    harness.backend.advance(DEBOUNCE + 1)
    harness.scheduler.sink("updated", None)
    harness.backend.advance(20)
    assert harness.deliver() == ["signal"] * 2


def test_periodic_snapshots_follow_interval():
    """Snapshots repeat at the interval, and never with an interval of 0."""
    harness = ScheduleHarness(interval=60).activate()
    harness.start()
    harness.backend.advance(185)
    assert harness.deliver() == ["periodic"] * 3
    harness = ScheduleHarness(interval=0).activate()
    harness.start()
    harness.backend.advance(10_000)
    assert harness.deliver() == []


def test_loop_ends_on_stop_event(harness):
    """A stop wakes the loop from its longest wait."""
    harness.start()
    harness.backend.advance(1)
    harness.stop_event.set()
    harness.manager.wake()
    harness.backend.advance(0.01)
    assert not harness.task.alive()


def test_revoked_stream_waits_for_activation(harness):
    """After a revocation nothing is published until the next activation, which starts from 1."""
    harness.activate().start()
    harness.manager.revoke()
    harness.scheduler.sink("updated", None)
    harness.backend.advance(1000)
    assert harness.deliver() == []
    harness.activate()
    assert harness.brain.published_reasons == ["activation"] * 2


def test_revocation_during_listing_stores_nothing(harness):
    """A listing that ends after its session stores nothing."""
    harness.activate()
    harness.bridge.seconds = 5
    task = harness.backend.spawn(harness.manager.resync, 60, name="t")
    harness.backend.advance(1)
    harness.manager.revoke()
    harness.backend.advance(10)
    assert not task.alive()
    assert harness.deliver() == []


def test_concurrent_snapshots_are_serialised(harness):
    """Concurrent snapshots are stored one after the other, numbered without a gap."""
    harness.activate()
    harness.bridge.seconds = 3
    for _ in range(5):
        harness.backend.spawn(harness.manager.resync, 60, name="t")
    harness.backend.advance(100)
    assert harness.deliver() == ["command"] * 5


def test_resync_reports_snapshots_and_errors(harness):
    """A resync counts the stored snapshots and reports the errors of the others."""
    harness.activate()
    assert harness.manager.resync(30) == {"schedulers_drained": 1, "skipped": {}}
    harness.scheduler.failure = OSError("no database")
    assert harness.manager.resync(30) == {
        "schedulers_drained": 0,
        "skipped": {"beat": "OSError: no database"},
    }
    harness.bridge.seconds = 100
    assert harness.manager.resync(30)["skipped"] == {"beat": "TimeoutError: "}
    assert harness.deliver() == ["command"]


# -- control


def test_control_disables_schedule_and_confirms(harness):
    """The schedule is disabled, and its row is confirmed with the expected number."""
    harness.activate()
    parameters = harness.brain.control(KEY, on=False)
    done = operations.control(harness.stream, parameters, 60)
    assert done == {
        "operation_id": parameters["operation_id"],
        "sequence": 2,
        "projection_buffered": True,
        "deduplicated": False,
    }
    assert harness.scheduler.calls == [("disable", KEY)]
    assert harness.deliver() == ["external-control"]
    assert harness.brain.rows[KEY] == parameters["desired_projection"]
    operations.control(harness.stream, harness.brain.control(KEY, on=True), 60)
    assert harness.scheduler.calls[-1] == ("enable", KEY)


def test_control_of_requested_state_only_confirms(harness):
    """A schedule in the requested state is confirmed without a call to the scheduler."""
    harness.activate()
    harness.scheduler.schedules[KEY] = harness.scheduler.schedules[KEY].model_copy(
        update={"is_enabled": False}
    )
    operations.control(harness.stream, harness.brain.control(KEY, on=False), 60)
    assert (harness.scheduler.calls, harness.deliver()) == ([], ["external-control"])


def test_control_ignores_run_since_snapshot(harness):
    """A run since the last snapshot is not a change.

    The confirmation has the brain's run fields.
    """
    harness.activate()
    ran = {
        "total_runs": 7,
        "last_run_at": "2026-11-23T13:00:00+00:00",
        "next_run_at": "2026-11-23T14:00:00+00:00",
    }
    harness.scheduler.schedules[KEY] = schedule("hourly", **ran)
    parameters = harness.brain.control(KEY, on=False)
    operations.control(harness.stream, parameters, 60)
    harness.deliver()
    assert harness.brain.rows[KEY] == {
        **parameters["desired_projection"],
        "next_run_at": "2026-11-23T14:00:00.000000+00:00",
    }


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda harness, parameters: parameters.update(expected_accepted_sequence=0),
            "published again after",
        ),
        (
            lambda harness, parameters: parameters.update(epoch_uuid="another"),
            "does not belong to this process",
        ),
        (
            lambda harness, parameters: parameters.update(desired_projection_digest="0" * 64),
            "does not match",
        ),
        (lambda harness, parameters: parameters.update(desired_projection=None), "does not match"),
        (
            lambda harness, parameters: parameters.update(source_key="id:daily"),
            "belongs to another schedule",
        ),
        (lambda harness, parameters: parameters.update(operation_id=3), "operation_id is required"),
        (lambda harness, parameters: harness.scheduler.schedules.clear(), "has no schedule"),
        (
            lambda harness, parameters: harness.scheduler.schedules.update(
                {KEY: schedule("hourly", expression="60")}
            ),
            "was changed after",
        ),
        (lambda harness, parameters: harness.manager.revoke(), "does not belong to this process"),
    ],
)
def test_control_mismatch_is_rejected(harness, alter, message):
    """A command for another epoch, schedule or state changes nothing and confirms nothing."""
    harness.activate()
    parameters = harness.brain.control(KEY, on=False)
    alter(harness, parameters)
    with pytest.raises(CommandError, match=message) as caught:
        operations.control(harness.stream, parameters, 60)
    assert not caught.value.indeterminate
    assert (harness.scheduler.calls, harness.deliver()) == ([], [])


def test_control_without_effect_is_not_confirmed(harness):
    """A call without effect is indeterminate, and a refusal is a failure. Neither is confirmed."""
    harness.activate()

    async def succeed_without_effect(_identity):
        return CommandResult(status="success")

    async def refuse(_identity):
        return CommandResult(status="failed", error="read-only")

    for method, message, indeterminate in (
        (succeed_without_effect, "not in the requested state", True),
        (refuse, "beat refuses: read-only", False),
    ):
        harness.scheduler.disable_schedule = method
        with pytest.raises(CommandError, match=message) as caught:
            operations.control(harness.stream, harness.brain.control(KEY, on=False), 60)
        assert caught.value.indeterminate is indeterminate
    assert harness.deliver() == []


# -- mutate


def test_update_reaches_scheduler_and_snapshot(harness):
    """An update gets the unredacted fields, and the snapshot and the result show it."""
    harness.scheduler.schedules[KEY] = schedule("hourly", kwargs={"token": "t"})
    harness.activate()
    parameters = harness.brain.mutation("update", KEY, expression="60")
    done = operations.mutate(harness.stream, parameters, 60)
    ((operation, identity, expected),) = harness.scheduler.calls
    assert (operation, identity, expected["kwargs"]) == ("update", KEY, {"token": "t"})
    assert harness.deliver() == [f"native-mutation:{parameters['operation_id']}"]
    assert (harness.brain.rows[KEY]["expression"], harness.brain.rows[KEY]["kwargs"]) == (
        "60",
        {"token": "[REDACTED]"},
    )
    assert (done["operation_id"], done["sequence"], done["source_key"]) == (
        parameters["operation_id"],
        2,
        KEY,
    )
    live = {"last_run_at", "next_run_at", "total_runs"}
    assert done["observed_configuration"] == {
        key: value for key, value in harness.brain.rows[KEY].items() if key not in live
    }


def test_create_and_delete_change_snapshot(harness):
    """A created schedule has its own key in the snapshot, and a deleted one is absent."""
    harness.activate()
    done = operations.mutate(
        harness.stream, harness.brain.mutation("create", name="new", task_name="a.task"), 60
    )
    assert (done["source_key"], done["observed_configuration"]["name"]) == ("id:new", "new")
    harness.deliver()
    done = operations.mutate(harness.stream, harness.brain.mutation("delete", "id:new"), 60)
    assert (done["source_key"], done["observed_configuration"]) == ("id:new", None)
    harness.deliver()
    assert set(harness.brain.rows) == {KEY, "id:daily"}


def test_trigger_runs_schedule_once(harness):
    """A trigger runs the schedule once and reports it."""
    harness.activate()
    done = operations.mutate(harness.stream, harness.brain.mutation("trigger", KEY), 60)
    assert harness.scheduler.calls == [("trigger_now", KEY)]
    assert (done["trigger_result"], done["source_key"]) == ({"status": "success"}, KEY)
    assert harness.deliver()


def test_redacted_key_resolves_to_adapter_key(harness):
    """A schedule whose key is redacted is triggered by its adapter's key."""
    harness.scheduler.schedules = {"a@example.com": schedule("a@example.com", external_id=None)}
    harness.activate()
    (key,) = harness.brain.rows
    operations.mutate(harness.stream, harness.brain.mutation("trigger", key), 60)
    assert harness.scheduler.calls == [("trigger_now", "a@example.com")]


@pytest.mark.parametrize(
    ("operation", "changes", "message"),
    [
        ("update", {"expected": None}, "was changed after"),
        ("trigger", {"expected": {"name": "other"}}, "was changed after"),
        ("delete", {"schedule_id": "id:none"}, "has no schedule"),
        ("update", {"schedule_id": None}, "schedule_id is required"),
        ("pause", {}, "pause is not an operation"),
        ("update", {"definition": 3}, "must be an object"),
        (
            "update",
            {"definition": {"kwargs": {"token": "[REDACTED]"}}},
            "would replace a value",
        ),
        ("update", {"source_scope": "{}"}, "source_scope"),
    ],
)
def test_mutation_mismatch_is_rejected(harness, operation, changes, message):
    """A command that does not match the schedule, the stream or the operations changes nothing."""
    harness.activate()
    parameters = {**harness.brain.mutation(operation, KEY), **changes}
    with pytest.raises(CommandError, match=message) as caught:
        operations.mutate(harness.stream, parameters, 60)
    assert not caught.value.indeterminate
    assert (harness.scheduler.calls, harness.deliver()) == ([], [])


def test_operation_needs_current_capability(harness):
    """An operation without the scheduler's current capability is rejected."""
    harness.activate()
    harness.scheduler.capability_names = {"list"}
    for operation, capability in (
        ("trigger", "trigger_now"),
        ("update", "external_schedule_mutation_v1"),
    ):
        with pytest.raises(CommandError, match=f"does not support {capability}"):
            operations.mutate(harness.stream, harness.brain.mutation(operation, KEY), 60)


def test_adapter_conflict_is_plain_failure(harness):
    """A refusal by the scheduler before any change is not indeterminate."""
    harness.activate()

    async def refuse(**_options):
        raise ConflictError("changed")

    harness.scheduler.apply_external_mutation = refuse
    with pytest.raises(CommandError, match="beat refuses") as caught:
        operations.mutate(harness.stream, harness.brain.mutation("update", KEY), 60)
    assert not caught.value.indeterminate


def test_failed_listing_after_change_is_indeterminate(harness):
    """A failed listing after a change is indeterminate, because the change was made."""
    harness.activate()
    harness.scheduler.failure = OSError("no database")
    with pytest.raises(CommandError, match="is done, but") as caught:
        operations.mutate(harness.stream, harness.brain.mutation("trigger", KEY), 60)
    assert caught.value.indeterminate


def test_operation_that_waited_too_long_is_not_started(harness):
    """A command whose time passed while it waited for the stream is not started."""
    harness.activate()
    harness.bridge.seconds = 15
    answers = []

    def ask():
        try:
            operations.mutate(harness.stream, harness.brain.mutation("trigger", KEY), 10)
        except CommandError as error:
            answers.append((str(error), error.indeterminate))

    harness.backend.spawn(harness.manager.resync, 60, name="t")
    harness.backend.spawn(ask, name="t")
    harness.backend.advance(100)
    assert answers == [("not done: another operation on beat took too long", False)]
    assert harness.scheduler.calls == []


# -- any order of operations


class Streams(RuleBasedStateMachine):
    """Any order of sessions, changes and commands leads to projections that the brain accepts."""

    def __init__(self):
        super().__init__()
        self.harness = ScheduleHarness()
        self.harness.start()

    def is_active(self):
        return self.harness.stream.authority is not None

    @rule()
    def start_session(self):
        self.harness.deliver()
        self.harness.manager.revoke()
        self.harness.stream.activate(self.harness.brain.grant(), 60)

    @rule()
    def end_session(self):
        self.harness.manager.revoke()

    @rule(seconds=st.sampled_from([0.1, 1, 1000]))
    def advance_time(self, seconds):
        self.harness.backend.advance(seconds)

    @rule(key=st.sampled_from("abc"), on=st.booleans())
    def change_schedule(self, key, on):
        self.harness.scheduler.schedules[f"id:{key}"] = schedule(key, is_enabled=on)
        self.harness.scheduler.sink("updated", None)

    @rule()
    def resync(self):
        self.harness.manager.resync(30)

    @precondition(is_active)
    @rule(data=st.data(), on=st.booleans())
    def control(self, data, on):
        self.harness.deliver()
        if self.harness.brain.rows:
            key = data.draw(st.sampled_from(sorted(self.harness.brain.rows)))
            self.operate(operations.control, self.harness.brain.control(key, on=on))

    @precondition(is_active)
    @rule(data=st.data(), operation=st.sampled_from(["trigger", "update", "delete"]))
    def mutate(self, data, operation):
        self.harness.deliver()
        if self.harness.brain.rows:
            key = data.draw(st.sampled_from(sorted(self.harness.brain.rows)))
            changes = {"expression": "5"} if operation == "update" else {}
            self.operate(operations.mutate, self.harness.brain.mutation(operation, key, **changes))

    def operate(self, operation, parameters):
        try:
            operation(self.harness.stream, parameters, 60)
        except CommandError as error:
            if error.indeterminate:
                raise

    @invariant()
    def brain_accepts_projections(self):
        ignored = self.harness.brain.ignored
        if self.is_active():
            self.harness.deliver()
            assert self.harness.brain.sequence == self.harness.stream.sequence
            assert self.harness.brain.ignored == ignored


def test_stream_survives_any_order_of_operations():
    """See ``Streams``."""
    machine = Streams.TestCase
    machine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
    machine("runTest").runTest()


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.text(max_size=5),
            st.lists(st.integers(), max_size=2),
        ),
    )
)
def test_arbitrary_parameters_are_rejected(garbage):
    """Arbitrary parameters raise ``CommandError`` and publish nothing."""
    harness = ScheduleHarness().activate()
    names = [
        "operation_id",
        "source_key",
        "epoch_number",
        "desired_projection",
        "expected",
        "definition",
        "operation",
    ]
    for number, value in enumerate(garbage.values()):
        garbage = {**garbage, names[number % len(names)]: value}
    for operate in (operations.control, operations.mutate):
        for base in ({}, harness.brain.authority):
            with pytest.raises(CommandError):
                operate(harness.stream, {**base, **garbage}, 60)
    assert harness.deliver() == []
