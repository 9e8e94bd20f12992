"""The contract of both stores, on disk and in memory."""

import ast
from pathlib import Path

import pytest
from zope.interface.verify import verifyClass, verifyObject

import z4j_bare.buffer
from z4j_bare.buffer import EVENT, PROJECTION, RESULT, BufferStore, MemoryStore
from z4j_bare.buffer.rows import LEDGER_CAP, LedgerEntry, StoreState, ranges
from z4j_bare.errors import LocalStorageError
from z4j_bare.interfaces import IStore

ALL = (EVENT, RESULT, PROJECTION)
MIB = 1024 * 1024


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["disk", "memory"])
def make_store(request, tmp_path, clock):
    """``make_store(**caps)`` returns a store on disk or in memory."""
    stores = []

    def build(**caps):
        if request.param == "disk":
            path = tmp_path / "home" / f"store-{len(stores)}.sqlite"
            stores.append(BufferStore(path, clock=clock, busy_timeout=0, **caps))
        else:
            stores.append(MemoryStore(clock=clock, **caps))
        return stores[-1]

    yield build
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store):
    return make_store()


def events(*payloads, kind=EVENT):
    return [(kind, f"task-{payload.decode(errors='replace')[:8]}", payload) for payload in payloads]


def all_rows(store):
    return store.drain(0, 1_000_000, 1 << 40, ALL)


def payloads(store):
    return [entry.payload for entry in all_rows(store)]


def is_balanced(store):
    stats = store.stats()
    return stats.produced == stats.confirmed + stats.rows + sum(stats.lost.values()) and (
        sum(stats.lost.values()) == sum(stats.lost_kinds.values())
    )


def test_both_stores_implement_istore(store):
    """Each store provides IStore, names and signatures included."""
    assert verifyObject(IStore, store)
    assert verifyClass(IStore, type(store))
    assert store.durable is isinstance(store, BufferStore)
    assert store.stats().durable is store.durable


def test_drained_rows_equal_appended_rows(store, clock):
    """Kind, key, payload and time are kept, ids grow in append order, and reads delete nothing."""
    assert (
        store.append(
            [(EVENT, "t1", b"\x00\xff"), (RESULT, "frame-1", b"{}"), (PROJECTION, "", b"")]
        )
        == 0
    )
    entries = all_rows(store)
    assert [(entry.kind, entry.key, entry.payload) for entry in entries] == [
        (EVENT, "t1", b"\x00\xff"),
        (RESULT, "frame-1", b"{}"),
        (PROJECTION, "", b""),
    ]
    assert [entry.id for entry in entries] == sorted({entry.id for entry in entries})
    assert {(entry.created_at, entry.attempts) for entry in entries} == {(clock.now, 0)}
    assert all_rows(store) == entries
    assert (store.size(), store.byte_size()) == (3, 4)


def test_entry_is_immutable(store):
    """A drained entry is an immutable value, safe to share between greenlets."""
    store.append(events(b"a"))
    with pytest.raises(AttributeError):
        all_rows(store)[0].payload = b"b"


def test_empty_call_changes_nothing(store):
    """Appending, confirming or discarding no rows changes nothing."""
    assert store.append([]) == store.confirm([]) == store.discard([], "x") == 0
    assert store.stats().produced == 0
    assert store.drain(0, 10, 1000, ALL) == []


def test_append_with_unknown_kind_is_rejected(store):
    """A row outside the eviction order is rejected together with the other rows of its call."""
    with pytest.raises(LocalStorageError, match="unknown kind"):
        store.append([*events(b"a"), ("gossip", "", b"b")])
    assert store.size() == 0
    assert is_balanced(store)


def test_lone_surrogate_in_key_is_replaced(store):
    """An invalid task id gets a replacement character, and the other rows are stored as well."""
    store.append([(EVENT, "fine", b"a"), (EVENT, "bad-\ud800", b"b"), (EVENT, "naïve", b"c")])
    assert [entry.key for entry in all_rows(store)] == ["fine", "bad-?", "naïve"]
    assert store.claim("\ud800", 1.0) is None
    store.settle("\ud800", b"r", 2.0)
    assert store.claim("\ud800", 3.0).result == b"r"


def test_drain_respects_cursor_and_limit(store):
    """``after`` is exclusive, ``limit`` counts rows, and a limit below one yields none."""
    store.append(events(*(b"%d" % n for n in range(10))))
    ids = [entry.id for entry in all_rows(store)]
    assert [entry.payload for entry in store.drain(ids[3], 3, 1000, ALL)] == [b"4", b"5", b"6"]
    assert store.drain(ids[-1], 5, 1000, ALL) == []
    assert store.drain(0, 0, 1000, ALL) == store.drain(0, -1, 1000, ALL) == []


def test_drain_respects_max_bytes(store):
    """Payloads add up to at most ``max_bytes``; a larger first row comes alone."""
    store.append(events(b"x" * 100, b"y" * 100, b"z"))
    assert [len(entry.payload) for entry in store.drain(0, 10, 200, ALL)] == [100, 100]
    assert [len(entry.payload) for entry in store.drain(0, 10, 199, ALL)] == [100]
    assert [len(entry.payload) for entry in store.drain(0, 10, 5, ALL)] == [100]


@pytest.mark.parametrize(
    "kinds", [(EVENT,), (RESULT,), (PROJECTION, RESULT), (EVENT, RESULT), ALL, ()]
)
def test_drain_respects_kinds(store, kinds):
    """Only rows of the requested kinds are returned, in the order of their ids."""
    store.append([(kind, "", b"%d" % n) for n, kind in enumerate(ALL * 3)])
    wanted = [b"%d" % n for n, kind in enumerate(ALL * 3) if kind in kinds]
    assert [entry.payload for entry in store.drain(0, 100, 1000, kinds)] == wanted


def test_confirm_deletes_only_given_rows(store):
    """Ids may be unordered, repeated or already deleted; all other rows stay."""
    store.append(events(*(b"%d" % n for n in range(10))))
    ids = [entry.id for entry in all_rows(store)]
    assert store.confirm([ids[7], ids[2], ids[3], ids[2], 999_999]) == 3
    assert payloads(store) == [b"0", b"1", b"4", b"5", b"6", b"8", b"9"]
    assert store.confirm([ids[2]]) == 0
    assert (store.stats().confirmed, store.stats().lost) == (3, {})
    assert is_balanced(store)


def test_discard_counts_losses_by_reason_and_kind(store):
    """Each discarded row is counted under its reason and its kind."""
    store.append([(EVENT, "", b"a"), (RESULT, "", b"b"), (EVENT, "", b"c")])
    ids = [entry.id for entry in all_rows(store)]
    assert store.discard(ids[:2], "rejected") == 2
    assert store.discard([*ids[:2], ids[2]], "") == 1
    assert store.stats().lost == {"rejected": 2, "": 1}
    assert store.stats().lost_kinds == {EVENT: 2, RESULT: 1}
    assert is_balanced(store)


def test_ids_are_never_reused(store):
    """An id is never assigned twice, so that a late ack cannot delete a newer row."""
    store.append(events(b"a"))
    first = all_rows(store)[0].id
    store.confirm([first])
    store.append(events(b"b"))
    assert all_rows(store)[0].id > first


def test_attempts_are_counted_per_row(store):
    """Rows of failed sessions have a count, and rows that were never sent have none."""
    store.append(events(b"a", b"b", b"c"))
    ids = [entry.id for entry in all_rows(store)]
    store.increment_attempts(ids[:1])
    store.increment_attempts([ids[0], ids[2]])
    assert [entry.attempts for entry in all_rows(store)] == [2, 0, 1]


def test_row_cap_evicts_oldest_rows(make_store):
    """The newest rows stay, and the loss is returned and counted."""
    store = make_store(max_rows=3)
    assert store.append(events(b"a", b"b")) == 0
    assert store.append(events(b"c", b"d", b"e")) == 2
    assert payloads(store) == [b"c", b"d", b"e"]
    assert store.append(events(*(b"%d" % n for n in range(10)))) == 10
    assert payloads(store) == [b"7", b"8", b"9"]
    assert store.stats().lost == {"capacity": 12}
    assert is_balanced(store)


def test_eviction_order_is_events_results_projections(make_store):
    """The eviction order applies whatever the age of the rows."""
    store = make_store(max_rows=4)
    store.append(
        [(PROJECTION, "", b"p"), (RESULT, "", b"r1"), (EVENT, "", b"e1"), (EVENT, "", b"e2")]
    )
    assert store.append([(RESULT, "", b"r2")]) == 1
    assert payloads(store) == [b"p", b"r1", b"e2", b"r2"]
    assert store.append([(RESULT, "", b"r3"), (PROJECTION, "", b"q")]) == 2
    assert payloads(store) == [b"p", b"r2", b"r3", b"q"]
    assert store.append([(EVENT, "", b"e3")]) == 1
    assert payloads(store) == [b"p", b"r2", b"r3", b"q"]
    assert store.stats().lost_kinds == {EVENT: 3, RESULT: 1}
    assert is_balanced(store)


def test_size_never_exceeds_byte_cap(make_store):
    """The size of the store with log and index never exceeds the cap, and the newest rows stay."""
    store = make_store(max_bytes=MIB)
    for number in range(60):
        store.append([(EVENT, "t", b"%06d" % (number * 20 + n) + bytes(5000)) for n in range(20)])
        assert store.stats().bytes <= MIB
        assert is_balanced(store)
    kept = [int(payload[:6]) for payload in payloads(store)]
    assert kept == list(range(1200 - len(kept), 1200))
    assert len(kept) * 5000 > MIB // 2


def test_repeated_attempts_stay_within_byte_cap(make_store):
    """Counting attempts of a large row in a nearly full store needs no more space than the cap."""
    store = make_store(max_bytes=MIB)
    store.append([(EVENT, "t", bytes(size)) for size in (250_000, 250_000, 250_000, 100_000)])
    for _ in range(12):
        store.increment_attempts([1])
        assert store.stats().bytes <= MIB
    assert [entry.attempts for entry in store.drain(0, 1, MIB, (EVENT,))] == [12]


def test_byte_cap_evicts_few_small_rows(make_store):
    """A small excess does not evict thousands of rows with empty payloads."""
    store = make_store(max_bytes=MIB)
    for _ in range(40):
        store.append([(EVENT, "k" * 30, b"")] * 1000)
    assert store.size() > 2000
    assert 0 < max(store.append([(EVENT, "k" * 30, b"")] * 10) for _ in range(300)) < 300
    assert is_balanced(store)


def test_oversized_row_is_lost_alone(make_store):
    """An oversized payload is counted as lost at once and evicts no other row."""
    store = make_store(max_bytes=MIB)
    store.append(events(b"a"))
    assert store.append([(RESULT, "", bytes(2 * MIB)), (EVENT, "", b"b")]) == 1
    assert payloads(store) == [b"a", b"b"]
    assert store.stats().lost_kinds == {RESULT: 1}
    assert is_balanced(store)


def test_stats_have_age_of_oldest_row(store, clock):
    """The age is in seconds, ``None`` without rows, and never negative."""
    assert store.stats().oldest_age is None
    store.append(events(b"a"))
    clock.now += 7.5
    store.append(events(b"b"))
    assert store.stats().oldest_age == 7.5
    clock.now -= 1000
    assert store.stats().oldest_age == 0.0
    assert store.stats().payload_bytes == 2
    assert store.stats().buffer_id == store.buffer_id


def test_command_is_claimed_once(store):
    """The first claim succeeds; later ones return the entry as started, then as done."""
    assert store.claim("c1", 10.0) is None
    again = store.claim("c1", 11.0)
    assert (again.key, again.state, again.result, again.at) == ("c1", "started", b"", 10.0)
    store.settle("c1", b"answer", 12.0)
    done = store.claim("c1", 13.0)
    assert (done.state, done.result, done.at) == ("done", b"answer", 12.0)
    assert store.size() == 0


def test_answer_appends_row_and_settles_command(store):
    """A command has its provisional result until its answer settles it and appends the result."""
    assert store.claim("c1", 10.0, b"provisional") is None
    assert (store.claim("c1", 11.0).state, store.claim("c1", 11.0).result) == (
        "started",
        b"provisional",
    )
    store.settle_and_queue("c1", b"answer", 12.0)
    store.settle_and_queue("unclaimed", b"other", 13.0)
    assert [(entry.key, entry.payload) for entry in store.drain(0, 9, 99, ("result",))] == [
        ("c1", b"answer"),
        ("unclaimed", b"other"),
    ]
    assert [store.claim(key, 14.0).result for key in ("c1", "unclaimed")] == [b"answer", b"other"]
    assert (store.stats().produced, store.stats().payload_bytes) == (2, 11)


def test_failed_effect_can_be_claimed_again(store):
    """A failed effect is claimed as if it were new; a later result replaces the failure."""
    assert store.claim("e1", 10.0) is None
    store.settle("e1", b"failure", 11.0, "failed")
    assert store.claim("e1", 12.0) is None
    assert store.claim("e1", 13.0).state == "started"
    store.settle("e1", b"answer", 14.0)
    assert store.claim("e1", 15.0).result == b"answer"


@pytest.mark.parametrize(
    ("here", "imported", "left"),
    [
        ("failed", "started", "started"),
        ("failed", "done", "done"),
        ("started", "failed", "started"),
        ("started", "done", "done"),
        ("done", "failed", "done"),
        ("done", "started", "done"),
    ],
)
def test_imported_entry_replaces_one_that_knows_less(store, here, imported, left):
    """A failed effect gives way to another entry, a started one only to its result."""
    store.claim("e1", 10.0)
    if here != "started":
        store.settle("e1", here.encode(), 11.0, here)
    entry = LedgerEntry("e1", imported, imported.encode(), 12.0)
    store.import_state(StoreState({}, (entry,)))
    assert store.claim("e1", 13.0).state == left


def test_settle_inserts_unclaimed_command(store):
    """A command that the cap removed while it ran is inserted again when it ends."""
    store.settle("c1", b"answer", 12.0)
    assert store.claim("c1", 13.0).state == "done"


def test_ledger_keeps_newest_commands(store, monkeypatch):
    """Above its cap, the ledger removes the oldest commands."""
    assert LEDGER_CAP == 10_000
    for module in ("ledger", "memory"):
        monkeypatch.setattr(f"z4j_bare.buffer.{module}.LEDGER_CAP", 3)
    for number in range(5):
        assert store.claim(f"c{number}", float(number)) is None
    assert [store.claim(f"c{number}", 9.0) is None for number in (4, 3, 2, 0)] == [
        False,
        False,
        False,
        True,
    ]


def test_removed_commands_free_their_bytes(make_store, monkeypatch):
    """The bytes of removed commands are free again, so the newest results stay."""
    for module in ("ledger", "memory"):
        monkeypatch.setattr(f"z4j_bare.buffer.{module}.LEDGER_CAP", 3)
    store = make_store(max_bytes=MIB)
    for number in range(30):
        store.claim(f"c{number}", float(number))
        store.settle(f"c{number}", bytes(10_000), float(number))
    store.settle("unclaimed", bytes(10_000), 30.0)
    assert [len(store.claim(key, 99.0).result) for key in ("c28", "c29", "unclaimed")] == [
        10_000
    ] * 3


def test_oldest_results_are_dropped_but_commands_stay(make_store):
    """Above the byte cap, the oldest result is dropped, but its command stays in the ledger."""
    store = make_store(max_bytes=MIB)
    for number in range(10):
        store.claim(f"c{number}", float(number))
        store.settle(f"c{number}", bytes(10_000), float(number))
    entries = [store.claim(f"c{number}", 99.0) for number in range(10)]
    assert {entry.state for entry in entries} == {"done"}
    sizes = [len(entry.result) for entry in entries]
    assert sizes[0] == 0
    assert sizes[-1] == 10_000
    assert sizes == sorted(sizes)
    assert 0 < sum(sizes) <= MIB // 16
    store.settle("c9", b"", 100.0)
    store.settle("c10", bytes(10_000), 101.0)
    assert store.claim("c5", 102.0).result == bytes(10_000)


def test_closed_store_raises(store):
    """Closing twice is allowed; every other call raises LocalStorageError."""
    store.append(events(b"a"))
    store.close()
    store.close()
    assert store.closed
    for call in (
        lambda: store.append(events(b"a")),
        lambda: store.drain(0, 1, 1, ALL),
        lambda: store.confirm([1]),
        lambda: store.discard([1], "x"),
        lambda: store.increment_attempts([1]),
        store.stats,
        lambda: store.claim("c", 1.0),
        lambda: store.settle("c", b"", 1.0),
        lambda: store.settle_and_queue("c", b"", 1.0),
        store.vacuum_step,
    ):
        with pytest.raises(LocalStorageError, match="closed"):
            call()


def test_vacuum_of_idle_store_completes(store):
    """Some vacuum step reports that the work is complete."""
    store.append(events(b"a"))
    assert any(store.vacuum_step() for _ in range(3))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], []),
        ([5], [(5, 5)]),
        ([3, 1, 2], [(1, 3)]),
        ([1, 1, 2, 2], [(1, 2)]),
        ([9, 1, 2, 4, 5, 7], [(1, 2), (4, 5), (7, 7), (9, 9)]),
    ],
)
def test_ranges_compress_consecutive_ids(ids, expected):
    """Consecutive ids become one range, whatever their order."""
    assert ranges(ids) == expected


def test_native_modules_import_nothing_that_is_patched():
    """No module of the native side imports logging, threading, queue, asyncio or socket."""
    folder = Path(z4j_bare.buffer.__file__).parent
    for module in folder.glob("*.py"):
        if module.name in {"manager.py", "adopt_loop.py"}:  # these run on the hub
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import | ast.ImportFrom)
                else []
            )
            names.append(getattr(node, "module", None) or "")
            assert not {"z4j_bare.buffer.manager", "z4j_bare.buffer.adopt_loop"}.intersection(names)
            assert not {"logging", "threading", "queue", "asyncio", "socket"}.intersection(names), (
                module.name
            )
