"""Store to brain, in virtual time: the window, the watchdog, results and their receipts, a disk that fails."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.session import SessionHarness
from z4j_bare.buffer.maintenance import MAX_DEFER_SECONDS
from z4j_bare.errors import NetworkError, PoisonRowError, ScheduleStreamError
from z4j_bare.pipeline.send import FRAME_BYTES, POLL_BUSY
from z4j_bare.wire.session import HelloAck
from z4j_bare.wire.window import ACK_DEADLINE, ACK_PAUSE, FRAME_EVENTS, FRAME_FIRST, SLOW_ACK


class SenderHarness(SessionHarness):
    """A session harness whose sender runs."""

    def __init__(self, *args):
        super().__init__(*args)
        self.start_sender()

    def hub_timer(self, seconds, function, *, once):
        """Stand in for ``BaseConcurrency.timer`` of a hub."""
        assert once
        return self.backend.spawn(lambda: (self.backend.sleep(seconds), function()), name="hub")


@pytest.fixture(params=["hub", "no hub"])
def world(request):
    """A running sender. After the pause behind an ack a hub's timer wakes it; without a hub it waits."""
    world = SenderHarness()
    if request.param == "hub":
        world.backend.timer = world.hub_timer
    return world


def test_everything_goes_in_order(world):
    """With a brain that keeps up, all events go out once, in order, in frames of bounded size, and leave the store."""
    world.ack_immediately()
    world.store(2600)
    world.backend.advance(5)
    assert world.transport.event_numbers() == list(range(2600))
    sizes = [len(frame["payload"]["events"]) for frame in world.transport.frames("event_batch")]
    assert (sizes[0], max(sizes)) == (FRAME_FIRST, FRAME_EVENTS)
    assert world.buffered() == 0
    assert (world.counters.sent, world.buffer.acked_events) == (2600, 2600)
    assert world.sender.is_idle()


def test_one_frame_at_a_time(world):
    """Without an ack a second frame waits; each ack lets one follow, a breath later, and the rest waits in the store."""
    world.store(2600)
    world.backend.advance(1.5)
    assert len(world.transport.event_numbers()) == FRAME_FIRST
    world.ack()
    world.backend.advance(ACK_PAUSE - 0.01)
    assert len(world.transport.event_numbers()) == FRAME_FIRST
    world.backend.advance(0.02)
    assert (
        len(world.transport.event_numbers())
        == FRAME_FIRST + world.sender._pacing.window.frame_events
    )
    world.backend.advance(MAX_DEFER_SECONDS - 0.1)
    assert world.buffered() == 2600 - FRAME_FIRST
    assert not world.sender.is_idle()


def test_a_hub_wakes_the_sender_when_the_breath_is_over(monkeypatch):
    """An ack wakes no sender that has to wait: one look for each frame, where there is a hub to time it."""
    world, steps = SenderHarness(), []
    world.backend.timer = world.hub_timer
    monkeypatch.setattr(
        world.sender, "_step", lambda *args, step=world.sender._step: steps.append(1) or step(*args)
    )
    world.store(2000)
    world.backend.advance(1)
    begun = len(steps)
    for _ in range(3):
        world.ack()
        world.backend.advance(ACK_PAUSE + 0.01)
    assert (len(world.transport.frames("event_batch")), len(steps) - begun) == (4, 3)


@pytest.mark.parametrize("acknowledged", [3, 5])
def test_what_the_brain_has_leaves_the_store_soon(world, acknowledged):
    """With nothing stored any more, acknowledged rows are deleted within four seconds, whether or not others wait for an ack."""
    for _ in range(5):
        world.store(1)
        world.connection.wake.set()
        world.backend.advance(SLOW_ACK + 0.1)  # a frame each
    world.buffer.stats()  # or a look for the figures' sake would delete them
    world.ack(acknowledged)
    world.backend.advance(POLL_BUSY + MAX_DEFER_SECONDS)
    assert world.disk.store.size() == 5 - acknowledged


def test_a_full_window_moves_with_each_ack(world):
    """After a wait longer than the idle time, an ack still wakes the sender."""
    world.store(3000)
    world.backend.advance(2.2)
    before = len(world.transport.event_numbers())
    world.ack()
    world.backend.advance(ACK_PAUSE + 0.01)
    assert len(world.transport.event_numbers()) > before


@pytest.mark.parametrize("begun", [False, True])
def test_a_look_that_outlasts_the_breath(world, monkeypatch, begun):
    """On a slow disk a look may begin before the ack, or in the breath after it, and end later: the next frame follows at once."""
    drain = world.buffer.read_next

    def slowly(*query):
        world.backend.sleep(0.5)
        return drain(*query)

    world.store(200)
    world.backend.advance(0.5)
    monkeypatch.setattr(world.buffer, "read_next", slowly)
    if begun:
        world.connection.wake.set()
        world.backend.advance(0.01)
    world.ack()
    world.backend.advance(1.2)
    assert len(world.transport.frames("event_batch")) == 2


def test_frames_stay_below_their_size(world):
    """Rows of 30 kB travel a few to a frame, never beyond 128 KiB."""
    world.ack_immediately()
    world.store(40, size=30_000)
    world.backend.advance(30)
    sizes = [
        len(json.dumps(frame, separators=(",", ":")))
        for frame in world.transport.frames("event_batch")
    ]
    assert max(sizes) <= FRAME_BYTES
    assert world.transport.event_numbers() == list(range(40))


def test_an_event_over_the_brains_limit_is_cut():
    """A row larger than the brain's own frame limit is cut to fit and marked, because the brain would close (4400)."""
    world = SenderHarness(HelloAck("a", "p", "s", max_frame_bytes=4096))
    world.ack_immediately()
    world.buffer.append(
        [
            (
                "event",
                "",
                json.dumps(
                    {"id": "e-1", "n": 1, "data": {"task_name": "t", "result": "x" * 50_000}}
                ).encode(),
            )
        ]
    )
    world.connection.wake.set()
    world.backend.advance(2)
    (event,) = (
        event
        for frame in world.transport.frames("event_batch")
        for event in frame["payload"]["events"]
    )
    assert len(json.dumps(world.transport.sent[0][1])) <= 4096
    assert (event["id"], event["data"]["task_name"]) == ("e-1", "t")
    assert world.buffered() == 0


def test_results_overtake_events(world):
    """A result goes ahead of thousands of waiting events, with a receipt request right behind it."""
    world.store(5000)
    world.backend.advance(0.5)
    world.store(1, kind="result")
    world.backend.advance(0.01)
    kinds = [frame["type"] for _, frame in world.transport.sent]
    assert kinds[-2:] == ["command_result", "event_batch"]
    assert world.transport.sent[-1][1]["payload"]["events"] == []
    assert world.transport.sent[-2][1]["id"] == "c-5000"


def test_a_busy_brain_gets_no_crumbs(world):
    """While a frame is under way new events wait for its ack, however many they are, and then travel together."""

    def more(events):
        world.store(events, wake=False)
        world.sender.on_stored(events)
        world.backend.advance(0.01)

    for _ in range(6):
        more(5)
    assert world.transport.event_numbers() == list(range(5))
    assert not world.sender.is_idle()
    more(FRAME_FIRST - 30)
    assert world.transport.event_numbers() == list(range(5))
    world.ack()
    world.backend.advance(ACK_PAUSE + 0.01)
    assert world.transport.event_numbers() == list(range(FRAME_FIRST))
    assert len(world.transport.frames("event_batch")) == 2
    assert not world.sender.is_idle()


def test_crumbs_do_not_wait_for_an_ack_that_never_comes(world):
    """Events behind a frame that the brain has skipped are sent some seconds later, and at once when the agent stops."""
    world.store(5)
    world.backend.advance(0.01)
    world.store(5)
    world.backend.advance(0.5)
    assert len(world.transport.event_numbers()) == 5
    world.backend.advance(SLOW_ACK + POLL_BUSY)
    assert len(world.transport.event_numbers()) == 10
    world.store(5)
    world.backend.advance(0.5)
    assert len(world.transport.event_numbers()) == 10
    world.sender.disable_pacing()
    world.backend.advance(0.01)
    assert len(world.transport.event_numbers()) == 15


def test_an_idle_brain_waits_for_nobody(world):
    """A single event goes out as soon as it is stored, unless an ack has just come, and what has just come then soon after."""
    world.ack_immediately()
    for number in range(1, 4):
        world.store(1, wake=False)
        world.sender.on_stored(1)
        world.backend.advance(0.01)
        assert len(world.transport.event_numbers()) == number
        world.backend.advance(ACK_PAUSE)
    world.store(1, wake=False)
    world.sender.on_stored(1)
    world.backend.advance(0.01)
    world.store(1, wake=False)
    world.sender.on_stored(1)
    world.backend.advance(0.01)
    assert len(world.transport.event_numbers()) == 4
    world.backend.advance(ACK_PAUSE)
    assert len(world.transport.event_numbers()) == 5
    world.backend.advance(ACK_PAUSE)
    assert world.sender.is_idle()


def test_a_result_waits_for_its_receipt(world):
    """A result leaves the store with the ack of the batch behind it, not before; and it is sent once."""
    world.store(1, kind="result")
    world.backend.advance(5)
    assert world.buffered() == 1
    assert not world.sender.is_idle()
    world.ack()
    world.backend.advance(5)
    assert world.buffered() == 0
    assert len(world.transport.frames("command_result")) == 1
    assert world.buffer.acked_events == 0, "results are no events"


def test_schedules_overtake_events_one_by_one(world):
    """Frames of a schedule stream go ahead of events, each alone, all at once, and the result behind what it tells of."""
    world.store(3000)
    world.backend.advance(0.5)
    before = len(world.transport.sent)
    world.store(3, kind="projection", size=60_000, wake=False)
    world.store(1, kind="result")
    world.backend.advance(0.01)
    sent = [frame for _, frame in world.transport.sent[before:]]
    assert [frame["type"] for frame in sent] == ["event_batch"] * 3 + [
        "command_result",
        "event_batch",
    ]
    assert [[event["n"] for event in frame["payload"]["events"]] for frame in sent[:3]] == [
        [3000],
        [3001],
        [3002],
    ]


def test_schedules_are_no_events(world):
    """Frames of a stream leave the store with their acks, and the figures of events do not count them."""
    world.ack_immediately()
    world.store(3, kind="projection")
    world.backend.advance(5)
    assert world.buffered() == 0
    assert (world.counters.sent, world.buffer.acked_events) == (0, 0)
    assert world.transport.event_numbers() == [0, 1, 2]
    world.store(2)
    world.backend.advance(5)
    assert (world.counters.sent, world.buffer.acked_events) == (2, 2)


def test_sender_ends_session_when_schedules_get_no_ack_twice():
    """A stream without acks is sent once more, in order; then a new session is needed."""
    world = SessionHarness()
    world.store(2, kind="projection")
    ended_at = []

    def run():
        with pytest.raises(ScheduleStreamError):
            world.sender.run(world.connection)
        ended_at.append(world.backend.now())

    began = world.backend.now()
    world.backend.spawn(run, name="z4j-send")
    world.backend.advance(ACK_DEADLINE + 5)
    assert world.transport.event_numbers() == [0, 1, 0, 1]
    world.backend.advance(ACK_DEADLINE + 5)
    assert world.transport.event_numbers() == [0, 1, 0, 1]
    assert ended_at[0] - began > 2 * ACK_DEADLINE


def test_many_results_do_not_starve_events(world):
    """A flood of results lets events through in between."""
    world.ack_immediately()
    world.store(400, kind="result", wake=False)
    world.store(10)
    world.backend.advance(5)
    kinds = [len(frame["payload"]["events"]) > 0 for frame in world.transport.frames("event_batch")]
    assert kinds.index(True) < 3
    assert len(world.transport.frames("command_result")) == 400
    assert world.buffered() == 0


def test_a_brain_that_cannot_keep_up_has_little_to_digest():
    """At 100 events a second a result waits for at most 5 s behind the events on their way, and all events arrive."""
    world = SenderHarness()
    backend, queue, waits = world.backend, [], []
    world.transport.on_frame = queue.append

    def digest():
        while True:
            if not queue:
                backend.sleep(0.01)
                continue
            frame = queue.pop(0)
            if frame["type"] == "command_result":
                waits.append(backend.now() - asked[int(frame["id"].removeprefix("c-"))])
            else:
                backend.sleep(len(frame["payload"]["events"]) / 100)
                world.sender.on_ack(frame["id"])

    backend.spawn(digest, name="brain")
    world.store(6000)
    asked = {}
    for _ in range(12):
        backend.advance(5)
        asked[world.rows_stored] = backend.now()
        world.store(1, kind="result")
    backend.advance(30)
    assert world.buffered() == 0
    assert sorted(world.transport.event_numbers()) == list(range(6000))
    assert len(waits) == 12
    assert max(waits[2:]) < 5, "the first two may meet the window before it has learned"


def test_the_watchdog(world):
    """After 90 s without any ack everything unacknowledged is sent again, with the same content under new frame ids."""
    world.store(10)
    world.backend.advance(ACK_DEADLINE - 1)
    assert world.transport.event_numbers() == list(range(10))
    world.backend.advance(4)
    assert world.transport.event_numbers() == list(range(10)) * 2
    first, second = world.transport.frames("event_batch")
    assert first["id"] != second["id"]
    world.sender.on_ack(second["id"])
    world.backend.advance(3)
    assert world.buffered() == 0


def test_no_resend_while_acks_arrive(world):
    """A brain that is slow but alive gets nothing twice, however long the last frame waits for its ack."""
    world.store(3000)
    world.backend.advance(1)
    while world.acked_frames < len(world.transport.frames("event_batch")):
        world.backend.advance(60)
        world.ack()
        world.backend.advance(0.1)
    world.backend.advance(5)
    assert world.transport.event_numbers() == list(range(3000))
    assert world.buffered() == 0


def test_a_late_ack_after_a_resend_is_harmless(world):
    """An ack of the frame that was given up neither deletes what it should not nor stops the loop."""
    world.store(5)
    world.backend.advance(ACK_DEADLINE + 3)
    first, second = world.transport.frames("event_batch")
    world.sender.on_ack(first["id"])
    world.backend.advance(2)
    assert world.buffered() == 5
    world.sender.on_ack(second["id"])
    world.backend.advance(2)
    assert world.buffered() == 0


def test_the_next_session_sends_it_again(world):
    """What a session leaves unacknowledged goes out again in the next one, first and in order."""
    world.store(700)
    world.backend.advance(1)
    world.ack()
    world.backend.advance(1.5)
    world.connection.close()
    world.backend.advance(1)
    assert not world.sender_task.alive()
    world.start_session()
    world.ack_immediately()
    world.store(1)
    world.backend.advance(3)
    assert world.transport.event_numbers() == list(range(FRAME_FIRST, 701))


def test_sender_ends_when_send_fails(world):
    """A send that fails ends the loop and loses no row."""
    world.end_session()
    world.reconnect()
    world.transport.send_error = NetworkError("reset")
    ended = world.run_loop(lambda: world.sender.run(world.connection))
    world.store(3)
    world.backend.advance(2)
    assert [type(error) for error in ended] == [NetworkError]
    assert world.buffered() == 3


def test_a_disk_that_fails_and_returns(world):
    """While the disk fails events go through memory; afterwards those on disk go out, none lost, none mistaken for another.

    Row ids start over with every change between disk and memory, so an ack must never cross it.
    """
    world.store(30)
    world.backend.advance(1)
    world.disk.full = True
    world.store(20)
    world.backend.advance(POLL_BUSY + 0.1)
    assert not world.buffer.durable
    assert world.buffer.generation == 1
    assert set(world.transport.event_numbers()) == set(range(50))
    newest = world.transport.frames("event_batch")[-1]
    world.disk.full = False
    world.backend.advance(3)
    world.sender.on_ack(newest["id"])
    world.backend.advance(4)
    assert world.buffer.durable
    assert world.disk.store.stats().rows >= 30, (
        "an ack of rows in memory must not delete rows on disk"
    )
    world.ack_immediately()
    world.backend.advance(ACK_DEADLINE + 5)
    assert set(world.transport.event_numbers()) == set(range(50))
    assert world.buffered() == 0


def test_what_the_failed_disk_still_holds_is_not_counted(world):
    """Acks whose rows were not deleted yet when the disk fails count for nothing: their rows come again."""
    world.store(5)
    world.backend.advance(0.5)
    world.ack()
    world.disk.full = True
    world.store(20, wake=False)
    assert world.buffer.generation == 1
    assert world.buffer.acked_events == 0


def test_acks_of_the_old_disk_do_not_touch_the_new_store(world):
    """An ack that arrives after the disk has failed deletes nothing from the memory that took over."""
    world.store(5)
    world.backend.advance(1)
    old = world.transport.frames("event_batch")[0]
    world.disk.full = True
    world.store(5)
    world.sender.on_ack(old["id"])
    world.backend.advance(3)
    assert world.buffer.stats().rows == 10, "five in memory, and five that wait on the disk"


# -- what the brain cannot take


class Brain:
    """A brain model that ends the session over any frame with a poisoned row, and acknowledges whatever else it gets.

    ``deaths`` holds the errors that the sessions ended with, as the sender judged them.
    """

    def __init__(self, world, poison, *, code=1011, mute=False):
        self.world = world
        self.poison = set(poison)
        self.code = code
        self.mute = mute
        self.arrived = []
        self.deaths = []
        self.hello_ack()

    def hello_ack(self):
        self.dead = False
        self.world.transport.on_frame = self.hear

    def hear(self, frame):
        if self.dead:
            return
        if frame["type"] == "command_result":
            rows = [int(frame["id"].removeprefix("c-"))]
        else:
            rows = [event["n"] for event in frame["payload"]["events"]]
        self.dead = self.mute or not self.poison.isdisjoint(rows)
        if not self.dead:
            self.arrived += rows
            if frame["type"] == "event_batch":
                self.world.sender.on_ack(frame["id"])

    def live(self, seconds=5.0):
        """Let time pass; a session that dies ends as the agent ends it, and the next one begins."""
        self.world.backend.advance(seconds)
        if not self.dead:
            return False
        self.world.connection.close()
        self.world.backend.advance(0.1)
        self.deaths.append(
            self.world.sender.on_session_error(
                self.world.connection, NetworkError("the brain failed on a frame", code=self.code)
            )
        )
        self.world.start_session()
        self.hello_ack()
        return True


def test_a_poisoned_event_is_found_and_dropped(world, caplog):
    """One event among 900 costs it alone and at most six sessions; the log names it, and its data stay out of the log."""
    event = {
        "n": 400,
        "kind": "task.failed",
        "engine": "celery",
        "task_id": "t-400",
        "data": {"password": "hunter2"},
    }
    world.store(400, wake=False)
    world.buffer.append([("event", "", json.dumps(event).encode())])
    world.rows_stored += 1
    world.store(499)
    brain = Brain(world, {400})
    while brain.live():
        assert len(brain.deaths) < 20
    assert sorted(set(brain.arrived)) == [number for number in range(900) if number != 400]
    kinds = [type(death) for death in brain.deaths]
    assert kinds[:2] == [NetworkError] * 2
    assert set(kinds[2:]) == {PoisonRowError}
    assert len(kinds) <= 6
    stats = world.buffer.stats()
    assert (stats.rows, stats.lost, stats.produced) == (0, {"poison": 1}, stats.confirmed + 1)
    (line,) = [
        record.getMessage() for record in caplog.records if "cannot accept" in record.getMessage()
    ]
    assert "a 'task.failed' of 'celery', task 't-400', 106 bytes" in line
    assert "hunter2" not in line


def test_a_poisoned_result_is_found_and_dropped(world, caplog):
    """A result that ends sessions is dropped as one event is, and neither events nor other results go with it."""
    world.store(30, wake=False)
    world.store(3, kind="result")
    brain = Brain(world, {31}, code=4400)
    while brain.live():
        assert len(brain.deaths) < 20
    assert sorted(set(brain.arrived)) == [number for number in range(33) if number != 31]
    assert len(brain.deaths) == 3
    stats = world.buffer.stats()
    assert (stats.rows, stats.lost, stats.lost_kinds) == (0, {"poison": 1}, {"result": 1})
    assert "the result of command c-31" in caplog.text


def test_a_brain_that_fails_on_everything_costs_nothing(world):
    """Where every session dies, whatever it is sent, no row is held to be the reason; all arrive when the brain is well."""
    world.store(300)
    brain = Brain(world, (), mute=True)
    for _ in range(50):
        brain.live()
    assert world.buffer.stats().lost == {}
    assert [
        len(frame["payload"]["events"]) for frame in world.transport.frames("event_batch")
    ] == []
    brain.mute = False
    brain.live()
    brain.live(30)
    assert sorted(brain.arrived) == list(range(300))
    assert world.buffered() == 0


def test_other_deaths_make_no_suspects(world):
    """A line that breaks, a restart and a brain that closes say nothing about the rows on their way."""
    world.store(10)
    brain = Brain(world, (), mute=True)
    for brain.code in (None, 1000, 1001, 1012, 4002, 4408, 4429, 503):
        brain.live()
    drained = world.disk.store.drain(0, 100, 10**6, ("event",))
    assert [entry.attempts for entry in drained] == [0] * 10


def test_the_search_outlives_the_process(world):
    """What is known of the suspects is in the store, so that an heir goes on where the search was."""
    world.store(900)
    brain = Brain(world, {7})
    for _ in range(4):
        brain.live()
    before = len(brain.deaths)
    heir = SenderHarness()
    rows = world.disk.store.drain(0, 1000, 10**7, ("event",))
    heir.buffer.run_on_disk(lambda store: store.import_rows(rows))
    heir.connection.wake.set()
    brain.world = heir
    brain.hello_ack()
    while brain.live():
        pass
    assert before == 4
    assert len(brain.deaths) - before <= 2, "from the beginning it would have been four at least"
    assert sorted(set(brain.arrived)) == [number for number in range(900) if number != 7]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 1500),
    st.lists(st.integers(0, 1499), max_size=5),
    st.integers(0, 5),
    st.sampled_from([1011, 4400, 4403]),
)
def test_innocents_arrive_and_the_guilty_are_counted(events, poison, results, code):
    """Any rows may be poisoned: those are lost and counted, all others arrive, in a bounded number of sessions."""
    world = SenderHarness()
    world.store(events, wake=False)
    world.store(results, kind="result")
    guilty = {number for number in poison if number < world.rows_stored}
    brain = Brain(world, guilty, code=code)
    while brain.live(10):
        assert len(brain.deaths) <= 6 * len(guilty)
    assert set(brain.arrived) == set(range(world.rows_stored)) - guilty
    stats = world.buffer.stats()
    assert (stats.rows, stats.lost.get("poison", 0)) == (0, len(guilty))
    assert stats.produced == stats.confirmed + len(guilty)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_line_does(data):
    """Delivery, acks in any order, late or lost, and line breaks: at the end every event has arrived, first time in order."""
    world = SenderHarness()
    seen = []
    for _ in range(data.draw(st.integers(1, 6), "sessions")):
        world.store(data.draw(st.integers(0, 900)))
        if data.draw(st.booleans(), "result"):
            world.store(1, kind="result")
        world.backend.advance(data.draw(st.sampled_from([0.1, 1.5, 7.0, 100.0]), "seconds"))
        frames = world.transport.frames("event_batch")
        for index in (
            data.draw(st.lists(st.integers(0, max(0, len(frames) - 1)), max_size=5), "acks")
            if frames
            else []
        ):
            world.sender.on_ack(frames[index]["id"])
        world.backend.advance(1.5)
        seen += world.transport.event_numbers()
        if data.draw(st.booleans(), "break"):
            world.connection.close()
            world.backend.advance(2)
            world.start_session()
        else:
            world.transport.sent.clear()
    world.connection.close()
    world.backend.advance(2)
    world.start_session()
    world.ack_immediately()
    world.connection.wake.set()
    world.backend.advance(60)
    seen += world.transport.event_numbers()
    firsts = list(dict.fromkeys(seen))
    assert firsts == sorted(firsts)
    stats = world.buffer.stats()
    assert stats.rows == 0
    assert stats.produced == stats.confirmed
    results = world.rows_stored - len(firsts)
    assert world.buffer.acked_events + results == stats.produced


class Moody:
    """A brain model with a mood for each frame: an ack before the send returns, a late one, none, or the session's end.

    When the moods are used up it acknowledges at once.
    """

    MOODS = ("early", "late", "later", "lost", "die")

    def __init__(self, world, moods):
        self.world = world
        self.moods = list(moods)
        self.received = []
        self.hello_ack()

    def hello_ack(self):
        self.dead = False
        self.world.transport.on_frame = self.hear

    def hear(self, frame):
        if self.dead or frame["type"] != "event_batch":
            return
        self.received += frame["payload"]["events"]
        mood = self.moods.pop() if self.moods else "early"
        if mood == "die":
            self.dead = True
        elif mood == "early":
            self.world.sender.on_ack(frame["id"])
        elif mood != "lost":
            self.world.backend.spawn(
                self.answer,
                self.world.sender,
                frame["id"],
                0.3 if mood == "late" else 40.0,
                name="ack",
            )

    def answer(self, sender, identity, seconds):
        self.world.backend.sleep(seconds)
        if sender is self.world.sender and not self.dead:
            sender.acked(identity)

    def live(self, seconds, code=None):
        self.world.backend.advance(seconds)
        if self.dead:
            self.world.connection.close()
            self.world.backend.advance(0.1)
            self.world.sender.on_session_error(
                self.world.connection, NetworkError("gone", code=code)
            )
            self.world.start_session()
            self.hello_ack()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_brain_gets_every_event_as_it_was(data):
    """Whatever the acks do, each event arrives, in order within its task, and each replay has the same id and time."""
    world, events = SenderHarness(), []
    brain = Moody(world, data.draw(st.lists(st.sampled_from(Moody.MOODS), max_size=60), "moods"))
    for _ in range(data.draw(st.integers(1, 6), "rounds")):
        fresh = [
            {
                "id": f"e-{number}",
                "n": number,
                "occurred_at": f"2026-11-23T10:00:00.{number:06d}+00:00",
                "task_id": f"t-{number % 7}",
            }
            for number in range(len(events), len(events) + data.draw(st.integers(0, 300), "events"))
        ]
        events += fresh
        world.buffer.append(
            [("event", event["task_id"], json.dumps(event).encode()) for event in fresh]
        )
        world.connection.wake.set()
        seconds = data.draw(st.sampled_from([0.1, 1.0, 7.0, 95.0]), "seconds")
        brain.live(seconds, data.draw(st.sampled_from([None, 1006, 1012, 4408]), "code"))
    brain.moods.clear()
    for _ in range(4):  # a session that was dying, and the watchdog for what was never acknowledged
        brain.live(ACK_DEADLINE + 5)
    assert {event["n"] for event in brain.received} == set(range(len(events)))
    assert all(event == events[event["n"]] for event in brain.received)
    for task in range(7):
        firsts = list(
            dict.fromkeys(event["n"] for event in brain.received if event["n"] % 7 == task)
        )
        assert firsts == sorted(firsts)
    stats = world.buffer.stats()
    assert (stats.rows, stats.lost, stats.produced) == (0, {}, stats.confirmed)
