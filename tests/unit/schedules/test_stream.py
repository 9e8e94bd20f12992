"""Streams in virtual time, judged by what the brain would make of every event: order, epochs, orders, one at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from z4j_core.errors import ConflictError
from z4j_core.models import CommandResult

from tests.support.streams import KEY, Planned, StreamBrain, schedule
from z4j_bare.errors import CommandError
from z4j_bare.schedules import operations
from z4j_bare.schedules.manager import DEBOUNCE


@pytest.fixture
def world():
    return Planned()


def test_inactive_stream_publishes_nothing(world):
    """Before an activation neither signals, nor the interval, nor a resync publish anything."""
    world.run()
    world.scheduler.sink("created", None)
    world.backend.advance(2000)
    assert world.room.resync(10) == {
        "schedulers_drained": 0,
        "skipped": {"beat": "the brain has not asked this process for its schedules"},
    }
    assert world.deliver() == []
    assert world.buffer.stats().rows == 0


def test_activation_stores_snapshot_before_result(world):
    """The result of an activation has its counts, and the snapshot is stored by then."""
    asked = world.brain.grant()
    told = world.stream.activate(asked, 60)
    assert told == {
        "scheduler": "beat", **world.brain.authority, "sequence": 1, "schedule_count": 2, "frame_count": 2,
    }  # fmt: skip
    assert (world.deliver(), world.rings) == (["activation"], 1)
    assert {key: row["is_enabled"] for key, row in world.brain.rows.items()} == {
        KEY: True,
        "id:daily": False,
    }


def test_repeated_activation_publishes_again(world):
    """The same activation again publishes a second snapshot with the next number."""
    asked = world.brain.grant()
    assert [world.stream.activate(asked, 60)["sequence"] for _ in range(2)] == [1, 2]
    assert world.deliver() == ["activation"] * 2


def test_older_epoch_is_rejected(world):
    """A late activation of the previous session is rejected. Another stream starts from 1."""
    late, asked = world.brain.grant(), world.brain.grant()
    world.stream.activate(asked, 60)
    with pytest.raises(CommandError, match="epoch 1 of beat is over"):
        world.stream.activate(late, 60)
    assert world.stream.snapshot("test")
    assert world.deliver() == ["activation", "test"]
    world.brain = StreamBrain()
    world.go()
    assert world.brain.told == ["activation"]


@pytest.mark.parametrize(
    "changes", [{"owner": "other"}, {"stable_source": False}, {"stable_source": None}]
)
def test_activation_needs_owner_and_stable_source(world, changes):
    """An activation for another owner or without a stable source is rejected."""
    with pytest.raises(CommandError, match="stable source"):
        world.stream.activate({**world.brain.grant(), **changes}, 60)
    assert world.stream.authority is None


def test_failed_listing_publishes_nothing(world):
    """A failed listing activates nothing and deletes nothing. The next listing publishes."""
    world.scheduler.failure = OSError("no database")
    with pytest.raises(OSError, match="no database"):
        world.stream.activate(world.brain.grant(), 60)
    assert world.stream.authority is None
    world.scheduler.failure = None
    world.go().run()
    world.scheduler.failure = OSError("no database")
    world.backend.advance(901)
    assert world.deliver() == []
    world.scheduler.failure = None
    world.backend.advance(901)
    assert world.deliver() == ["periodic"]


def test_signals_are_debounced(world):
    """A hundred signals cause one snapshot, which ignores the schedules in the signals."""
    world.go().run()
    world.scheduler.kept["id:new"] = schedule("new")
    for _ in range(100):
        world.scheduler.sink("created", None)
    world.backend.advance(10)
    assert world.deliver() == ["signal"]
    assert "id:new" in world.brain.rows


def test_change_during_snapshot_causes_next_snapshot(world):
    """A change during a listing is published by the next snapshot."""
    world.go().run()
    world.bridge.seconds = 5
    world.scheduler.sink("updated", None)
    world.backend.advance(DEBOUNCE + 1)
    world.scheduler.sink("updated", None)
    world.backend.advance(20)
    assert world.deliver() == ["signal"] * 2


def test_periodic_snapshots_follow_interval():
    """Snapshots repeat at the interval, and never with an interval of 0."""
    world = Planned(interval=60).go()
    world.run()
    world.backend.advance(185)
    assert world.deliver() == ["periodic"] * 3
    world = Planned(interval=0).go()
    world.run()
    world.backend.advance(10_000)
    assert world.deliver() == []


def test_loop_ends_on_stop_event(world):
    """A stop wakes the loop from its longest wait."""
    world.run()
    world.backend.advance(1)
    world.stop_event.set()
    world.room.wake()
    world.backend.advance(0.01)
    assert not world.task.alive()


def test_revoked_stream_waits_for_activation(world):
    """After a revocation nothing is published until the next activation, which starts from 1."""
    world.go().run()
    world.room.revoke()
    world.scheduler.sink("updated", None)
    world.backend.advance(1000)
    assert world.deliver() == []
    world.go()
    assert world.brain.told == ["activation"] * 2


def test_revocation_during_listing_stores_nothing(world):
    """A listing that ends after its session stores nothing."""
    world.go()
    world.bridge.seconds = 5
    task = world.backend.spawn(world.room.resync, 60, name="t")
    world.backend.advance(1)
    world.room.revoke()
    world.backend.advance(10)
    assert not task.alive()
    assert world.deliver() == []


def test_concurrent_snapshots_are_serialised(world):
    """Concurrent snapshots are stored one after the other, numbered without a gap."""
    world.go()
    world.bridge.seconds = 3
    for _ in range(5):
        world.backend.spawn(world.room.resync, 60, name="t")
    world.backend.advance(100)
    assert world.deliver() == ["command"] * 5


def test_resync_reports_snapshots_and_errors(world):
    """A resync counts the stored snapshots and reports the errors of the others."""
    world.go()
    assert world.room.resync(30) == {"schedulers_drained": 1, "skipped": {}}
    world.scheduler.failure = OSError("no database")
    assert world.room.resync(30) == {
        "schedulers_drained": 0,
        "skipped": {"beat": "OSError: no database"},
    }
    world.bridge.seconds = 100
    assert world.room.resync(30)["skipped"] == {"beat": "TimeoutError: "}
    assert world.deliver() == ["command"]


# -- control


def test_control_disables_schedule_and_confirms(world):
    """The schedule is disabled, and its row is confirmed with the expected number."""
    world.go()
    asked = world.brain.control(KEY, on=False)
    done = operations.control(world.stream, asked, 60)
    assert done == {
        "operation_id": asked["operation_id"],
        "sequence": 2,
        "projection_buffered": True,
        "deduplicated": False,
    }
    assert world.scheduler.calls == [("disable", KEY)]
    assert world.deliver() == ["external-control"]
    assert world.brain.rows[KEY] == asked["desired_projection"]
    operations.control(world.stream, world.brain.control(KEY, on=True), 60)
    assert world.scheduler.calls[-1] == ("enable", KEY)


def test_control_of_requested_state_only_confirms(world):
    """A schedule in the requested state is confirmed without a call to the scheduler."""
    world.go()
    world.scheduler.kept[KEY] = world.scheduler.kept[KEY].model_copy(update={"is_enabled": False})
    operations.control(world.stream, world.brain.control(KEY, on=False), 60)
    assert (world.scheduler.calls, world.deliver()) == ([], ["external-control"])


def test_control_ignores_run_since_snapshot(world):
    """A run since the last snapshot is not a change.

    The confirmation has the brain's run fields.
    """
    world.go()
    ran = {
        "total_runs": 7,
        "last_run_at": "2026-11-23T13:00:00+00:00",
        "next_run_at": "2026-11-23T14:00:00+00:00",
    }
    world.scheduler.kept[KEY] = schedule("hourly", **ran)
    asked = world.brain.control(KEY, on=False)
    operations.control(world.stream, asked, 60)
    world.deliver()
    assert world.brain.rows[KEY] == {
        **asked["desired_projection"],
        "next_run_at": "2026-11-23T14:00:00.000000+00:00",
    }


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda world, asked: asked.update(expected_accepted_sequence=0), "published again after"),
        (
            lambda world, asked: asked.update(epoch_uuid="another"),
            "does not belong to this process",
        ),
        (
            lambda world, asked: asked.update(desired_projection_digest="0" * 64),
            "does not match",
        ),
        (lambda world, asked: asked.update(desired_projection=None), "does not match"),
        (lambda world, asked: asked.update(source_key="id:daily"), "belongs to another schedule"),
        (lambda world, asked: asked.update(operation_id=3), "operation_id is required"),
        (lambda world, asked: world.scheduler.kept.clear(), "has no schedule"),
        (
            lambda world, asked: world.scheduler.kept.update(
                {KEY: schedule("hourly", expression="60")}
            ),
            "was changed after",
        ),
        (lambda world, asked: world.room.revoke(), "does not belong to this process"),
    ],
)
def test_control_mismatch_is_rejected(world, spoil, complaint):
    """A command for another epoch, schedule or state changes nothing and confirms nothing."""
    world.go()
    asked = world.brain.control(KEY, on=False)
    spoil(world, asked)
    with pytest.raises(CommandError, match=complaint) as refused:
        operations.control(world.stream, asked, 60)
    assert not refused.value.indeterminate
    assert (world.scheduler.calls, world.deliver()) == ([], [])


def test_control_without_effect_is_not_confirmed(world):
    """A call without effect is indeterminate, and a refusal is a failure. Neither is confirmed."""
    world.go()

    async def agrees(_identity):
        return CommandResult(status="success")

    async def refuses(_identity):
        return CommandResult(status="failed", error="read-only")

    for method, complaint, indeterminate in (
        (agrees, "not in the requested state", True),
        (refuses, "beat refuses: read-only", False),
    ):
        world.scheduler.disable_schedule = method
        with pytest.raises(CommandError, match=complaint) as refused:
            operations.control(world.stream, world.brain.control(KEY, on=False), 60)
        assert refused.value.indeterminate is indeterminate
    assert world.deliver() == []


# -- mutate


def test_update_reaches_scheduler_and_snapshot(world):
    """An update gets the unredacted fields, and the snapshot and the result show it."""
    world.scheduler.kept[KEY] = schedule("hourly", kwargs={"token": "t"})
    world.go()
    asked = world.brain.mutation("update", KEY, expression="60")
    done = operations.mutate(world.stream, asked, 60)
    ((operation, identity, expected),) = world.scheduler.calls
    assert (operation, identity, expected["kwargs"]) == ("update", KEY, {"token": "t"})
    assert world.deliver() == [f"native-mutation:{asked['operation_id']}"]
    assert (world.brain.rows[KEY]["expression"], world.brain.rows[KEY]["kwargs"]) == (
        "60",
        {"token": "[REDACTED]"},
    )
    assert (done["operation_id"], done["sequence"], done["source_key"]) == (
        asked["operation_id"],
        2,
        KEY,
    )
    live = {"last_run_at", "next_run_at", "total_runs"}
    assert done["observed_configuration"] == {
        key: value for key, value in world.brain.rows[KEY].items() if key not in live
    }


def test_create_and_delete_change_snapshot(world):
    """A created schedule has its own key in the snapshot, and a deleted one is absent."""
    world.go()
    done = operations.mutate(
        world.stream, world.brain.mutation("create", name="new", task_name="a.task"), 60
    )
    assert (done["source_key"], done["observed_configuration"]["name"]) == ("id:new", "new")
    world.deliver()
    done = operations.mutate(world.stream, world.brain.mutation("delete", "id:new"), 60)
    assert (done["source_key"], done["observed_configuration"]) == ("id:new", None)
    world.deliver()
    assert set(world.brain.rows) == {KEY, "id:daily"}


def test_trigger_runs_schedule_once(world):
    """A trigger runs the schedule once and reports it."""
    world.go()
    done = operations.mutate(world.stream, world.brain.mutation("trigger", KEY), 60)
    assert world.scheduler.calls == [("trigger_now", KEY)]
    assert (done["trigger_result"], done["source_key"]) == ({"status": "success"}, KEY)
    assert world.deliver()


def test_redacted_key_resolves_to_adapter_key(world):
    """A schedule whose key is redacted is triggered by its adapter's key."""
    world.scheduler.kept = {"a@example.com": schedule("a@example.com", external_id=None)}
    world.go()
    (key,) = world.brain.rows
    operations.mutate(world.stream, world.brain.mutation("trigger", key), 60)
    assert world.scheduler.calls == [("trigger_now", "a@example.com")]


@pytest.mark.parametrize(
    ("operation", "changes", "complaint"),
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
def test_mutation_mismatch_is_rejected(world, operation, changes, complaint):
    """A command that does not match the schedule, the stream or the operations changes nothing."""
    world.go()
    asked = {**world.brain.mutation(operation, KEY), **changes}
    with pytest.raises(CommandError, match=complaint) as refused:
        operations.mutate(world.stream, asked, 60)
    assert not refused.value.indeterminate
    assert (world.scheduler.calls, world.deliver()) == ([], [])


def test_operation_needs_current_capability(world):
    """An operation without the scheduler's current capability is rejected."""
    world.go()
    world.scheduler.able = {"list"}
    for operation, capability in (
        ("trigger", "trigger_now"),
        ("update", "external_schedule_mutation_v1"),
    ):
        with pytest.raises(CommandError, match=f"does not support {capability}"):
            operations.mutate(world.stream, world.brain.mutation(operation, KEY), 60)


def test_adapter_conflict_is_plain_failure(world):
    """A refusal by the scheduler before any change is not indeterminate."""
    world.go()

    async def refuses(**_options):
        raise ConflictError("changed")

    world.scheduler.apply_external_mutation = refuses
    with pytest.raises(CommandError, match="beat refuses") as refused:
        operations.mutate(world.stream, world.brain.mutation("update", KEY), 60)
    assert not refused.value.indeterminate


def test_failed_listing_after_change_is_indeterminate(world):
    """A failed listing after a change is indeterminate, because the change was made."""
    world.go()
    world.scheduler.failure = OSError("no database")
    with pytest.raises(CommandError, match="done, but") as refused:
        operations.mutate(world.stream, world.brain.mutation("trigger", KEY), 60)
    assert refused.value.indeterminate


def test_operation_that_waited_too_long_is_not_started(world):
    """A command whose time passed while it waited for the stream is not started."""
    world.go()
    world.bridge.seconds = 15
    answers = []

    def ask():
        try:
            operations.mutate(world.stream, world.brain.mutation("trigger", KEY), 10)
        except CommandError as error:
            answers.append((str(error), error.indeterminate))

    world.backend.spawn(world.room.resync, 60, name="t")
    world.backend.spawn(ask, name="t")
    world.backend.advance(100)
    assert answers == [("not done: another operation on beat took too long", False)]
    assert world.scheduler.calls == []


# -- anything in any order


class Streams(RuleBasedStateMachine):
    """Whatever happens in whatever order, the brain takes all that it is sent, and knows the schedules after a snapshot."""

    def __init__(self):
        super().__init__()
        self.world = Planned()
        self.world.run()

    def alive(self):
        return self.world.stream.authority is not None

    @rule()
    def a_session(self):
        self.world.deliver()
        self.world.room.revoke()
        self.world.stream.activate(self.world.brain.grant(), 60)

    @rule()
    def a_session_ends(self):
        self.world.room.revoke()

    @rule(seconds=st.sampled_from([0.1, 1, 1000]))
    def time_passes(self, seconds):
        self.world.backend.advance(seconds)

    @rule(key=st.sampled_from("abc"), on=st.booleans())
    def the_host_changes_something(self, key, on):
        self.world.scheduler.kept[f"id:{key}"] = schedule(key, is_enabled=on)
        self.world.scheduler.sink("updated", None)

    @rule()
    def resync(self):
        self.world.room.resync(30)

    @precondition(alive)
    @rule(data=st.data(), on=st.booleans())
    def control(self, data, on):
        self.world.deliver()
        if self.world.brain.rows:
            key = data.draw(st.sampled_from(sorted(self.world.brain.rows)))
            self.order(operations.control, self.world.brain.control(key, on=on))

    @precondition(alive)
    @rule(data=st.data(), operation=st.sampled_from(["trigger", "update", "delete"]))
    def mutate(self, data, operation):
        self.world.deliver()
        if self.world.brain.rows:
            key = data.draw(st.sampled_from(sorted(self.world.brain.rows)))
            changes = {"expression": "5"} if operation == "update" else {}
            self.order(operations.mutate, self.world.brain.mutation(operation, key, **changes))

    def order(self, give, asked):
        try:
            give(self.world.stream, asked, 60)
        except CommandError as error:
            if error.indeterminate:
                raise

    @invariant()
    def the_brain_takes_it(self):
        ignored = self.world.brain.ignored
        if self.alive():
            self.world.deliver()
            assert self.world.brain.sequence == self.world.stream.sequence
            assert self.world.brain.ignored == ignored


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
    world = Planned().go()
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
    for give in (operations.control, operations.mutate):
        for base in ({}, world.brain.authority):
            with pytest.raises(CommandError):
                give(world.stream, {**base, **garbage}, 60)
    assert world.deliver() == []
