"""Streams in virtual time, judged by what the brain would make of every event: order, epochs, orders, one at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from z4j_core.errors import ConflictError
from z4j_core.models import CommandResult

from tests.support.streams import KEY, Planned, StreamBrain, schedule
from z4j_bare.errors import CommandError
from z4j_bare.schedules import operations as operations
from z4j_bare.schedules.manager import DEBOUNCE


@pytest.fixture
def world():
    return Planned()


def test_nothing_is_told_unasked(world):
    """Before the brain has granted an epoch neither signals, nor the interval, nor a resync tell anything."""
    world.run()
    world.scheduler.sink("created", None)
    world.backend.advance(2000)
    assert world.room.resync(10) == {
        "schedulers_drained": 0,
        "skipped": {"beat": "the brain has not asked this process for its schedules"},
    }
    assert world.deliver() == []
    assert world.buffer.stats().rows == 0


def test_an_activation_tells_everything(world):
    """The answer to an activation names stream, sequence and counts, and its snapshot is in the store by then."""
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


def test_an_activation_again(world):
    """The same activation once more tells everything once more, under the next number."""
    asked = world.brain.grant()
    assert [world.stream.activate(asked, 60)["sequence"] for _ in range(2)] == [1, 2]
    assert world.deliver() == ["activation"] * 2


def test_an_older_epoch_is_over(world):
    """What comes late from the session before is refused, and the newer stream goes on; another stream starts anew."""
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
def test_what_is_no_activation(world, changes):
    """A stream is told by its owner, as a stable source, or not at all."""
    with pytest.raises(CommandError, match="stable source"):
        world.stream.activate({**world.brain.grant(), **changes}, 60)
    assert world.stream.authority is None


def test_a_scheduler_that_fails(world):
    """A list that cannot be read activates nothing and deletes nothing; the next one does."""
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


def test_signals_are_gathered(world):
    """A hundred changes at once are one snapshot, which tells what is there then and not what the signals said."""
    world.go().run()
    world.scheduler.kept["id:new"] = schedule("new")
    for _ in range(100):
        world.scheduler.sink("created", None)
    world.backend.advance(10)
    assert world.deliver() == ["signal"]
    assert "id:new" in world.brain.rows


def test_a_change_while_it_is_told(world):
    """What changes while a snapshot is read is told by the next one."""
    world.go().run()
    world.bridge.seconds = 5
    world.scheduler.sink("updated", None)
    world.backend.advance(DEBOUNCE + 1)
    world.scheduler.sink("updated", None)
    world.backend.advance(20)
    assert world.deliver() == ["signal"] * 2


def test_the_interval_is_a_setting():
    """Every so many seconds all is told anew, and never when the setting is 0."""
    world = Planned(interval=60).go()
    world.run()
    world.backend.advance(185)
    assert world.deliver() == ["periodic"] * 3
    world = Planned(interval=0).go()
    world.run()
    world.backend.advance(10_000)
    assert world.deliver() == []


def test_the_loop_ends(world):
    """Stopping wakes the loop out of its longest wait."""
    world.run()
    world.backend.advance(1)
    world.stop_event.set()
    world.room.wake()
    world.backend.advance(0.01)
    assert not world.task.alive()


def test_a_session_that_ends_ends_the_stream(world):
    """After it nothing is told until the next activation, which begins with number 1."""
    world.go().run()
    world.room.revoke()
    world.scheduler.sink("updated", None)
    world.backend.advance(1000)
    assert world.deliver() == []
    world.go()
    assert world.brain.told == ["activation"] * 2


def test_a_session_that_ends_while_it_is_told(world):
    """A listing that outlasts its session stores nothing: it would be of nobody's epoch."""
    world.go()
    world.bridge.seconds = 5
    task = world.backend.spawn(world.room.resync, 60, name="t")
    world.backend.advance(1)
    world.room.revoke()
    world.backend.advance(10)
    assert not task.alive()
    assert world.deliver() == []


def test_one_thing_at_a_time(world):
    """Snapshots that are asked for together come one after the other, numbered without a gap."""
    world.go()
    world.bridge.seconds = 3
    for _ in range(5):
        world.backend.spawn(world.room.resync, 60, name="t")
    world.backend.advance(100)
    assert world.deliver() == ["command"] * 5


def test_resync_says_what_it_has_done(world):
    """A resync counts the snapshots that it has stored, and names what hindered the others."""
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


def test_control_switches_and_confirms(world):
    """The schedule is switched off in the scheduler, and the one row says so under the number that was expected."""
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


def test_control_of_what_is_so_already(world):
    """A schedule that is as wanted is confirmed without touching the scheduler."""
    world.go()
    world.scheduler.kept[KEY] = world.scheduler.kept[KEY].model_copy(update={"is_enabled": False})
    operations.control(world.stream, world.brain.control(KEY, on=False), 60)
    assert (world.scheduler.calls, world.deliver()) == ([], ["external-control"])


def test_control_minds_what_runs_meanwhile(world):
    """A run since the last snapshot is no change: the row repeats the figures that the brain knows."""
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
def test_control_that_is_refused(world, spoil, complaint):
    """An order for another epoch, schedule or state changes nothing and confirms nothing."""
    world.go()
    asked = world.brain.control(KEY, on=False)
    spoil(world, asked)
    with pytest.raises(CommandError, match=complaint) as refused:
        operations.control(world.stream, asked, 60)
    assert not refused.value.indeterminate
    assert (world.scheduler.calls, world.deliver()) == ([], [])


def test_control_without_an_effect(world):
    """A scheduler that agrees and does nothing is indeterminate; one that refuses is a failure; neither is confirmed."""
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


def test_a_change(world):
    """An update reaches the scheduler with what it has itself, and the snapshot and the answer show it."""
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


def test_creation_and_deletion(world):
    """What is created is told under its own key, what is deleted is gone from the snapshot."""
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


def test_a_trigger(world):
    """A trigger runs the schedule once and says so."""
    world.go()
    done = operations.mutate(world.stream, world.brain.mutation("trigger", KEY), 60)
    assert world.scheduler.calls == [("trigger_now", KEY)]
    assert (done["trigger_result"], done["source_key"]) == ({"status": "success"}, KEY)
    assert world.deliver()


def test_a_hidden_key_finds_its_schedule(world):
    """What the brain knows by a digest of its name is triggered by its real one."""
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
def test_a_change_that_is_refused(world, operation, changes, complaint):
    """What does not fit the schedule, the stream or the vocabulary changes nothing and tells nothing."""
    world.go()
    asked = {**world.brain.mutation(operation, KEY), **changes}
    with pytest.raises(CommandError, match=complaint) as refused:
        operations.mutate(world.stream, asked, 60)
    assert not refused.value.indeterminate
    assert (world.scheduler.calls, world.deliver()) == ([], [])


def test_capabilities_are_asked_each_time(world):
    """A scheduler that says it can do neither does neither."""
    world.go()
    world.scheduler.able = {"list"}
    for operation, capability in (
        ("trigger", "trigger_now"),
        ("update", "external_schedule_mutation_v1"),
    ):
        with pytest.raises(CommandError, match=f"does not support {capability}"):
            operations.mutate(world.stream, world.brain.mutation(operation, KEY), 60)


def test_a_conflict_is_no_mystery(world):
    """What the scheduler refuses before it does anything is a plain failure."""
    world.go()

    async def refuses(**_options):
        raise ConflictError("changed")

    world.scheduler.apply_external_mutation = refuses
    with pytest.raises(CommandError, match="beat refuses") as refused:
        operations.mutate(world.stream, world.brain.mutation("update", KEY), 60)
    assert not refused.value.indeterminate


def test_done_but_not_told(world):
    """A change after which the schedules cannot be read is indeterminate: it has happened."""
    world.go()
    world.scheduler.failure = OSError("no database")
    with pytest.raises(CommandError, match="done, but") as refused:
        operations.mutate(world.stream, world.brain.mutation("trigger", KEY), 60)
    assert refused.value.indeterminate


def test_no_time_left(world):
    """An order that has waited for its turn until its time was up is not begun."""
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


def test_streams_in_any_order():
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
def test_garbage_is_refused(garbage):
    """Parameters of any kind end in a refusal, never in anything else, and tell nothing."""
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
