"""The dispatcher in virtual time: acks, the ledger, the worker limit, deadlines and results."""

import importlib
import json
from types import SimpleNamespace

import pytest
from z4j_core.errors import Z4JError

from tests.support.commands import CommandHarness
from tests.support.engines import success
from z4j_bare.buffer.rows import DONE, IN_OTHER_PROCESS, RESULT, STARTED, LedgerEntry
from z4j_bare.errors import CommandError


@pytest.fixture
def harness():
    return CommandHarness()


def test_command_is_acknowledged_before_it_runs(harness):
    """The ack goes out first; the result carries id and token, and storing it wakes the sender."""
    harness.host.seconds = 5
    harness.command(token="tok")
    assert [
        (frame["id"], frame["payload"]) for frame in harness.transport.frames("command_ack")
    ] == [("c-1", {"delivery_claim_token": "tok"})]
    assert harness.results == []
    harness.backend.advance(6)
    assert harness.results == [
        (
            "c-1",
            {
                "status": "success",
                "result": {"ok": True},
                "error": None,
                "delivery_claim_token": "tok",
            },
        )
    ]
    assert (harness.counters.commands, harness.wakeups) == (1, 1)


def test_redelivered_command_runs_once(harness):
    """A redelivery is acknowledged while the command runs, and repeats its result afterwards."""
    harness.host.seconds = 5
    for _ in range(3):
        harness.command()
        harness.backend.advance(3)
    assert len(harness.host.calls) == 1
    assert len(harness.transport.frames("command_ack")) == 3
    assert [body["result"] for _, body in harness.results] == [{"ok": True}] * 2


def test_next_process_repeats_result_from_ledger(harness):
    """A finished command gets its result again, one that was only started is indeterminate."""
    harness.command(identity="done", token="tok")
    harness.backend.advance(1)
    harness.host.seconds = 1000
    harness.command(identity="started", token="tok")
    harness.backend.advance(1)
    assert harness.disk.store.claim("started", 0.0).state == STARTED
    assert harness.disk.store.claim("done", 0.0).state == DONE
    harness.new_process()
    for identity in ("done", "started"):
        harness.command(identity=identity)
    harness.backend.advance(1)
    assert len(harness.host.calls) == 2
    repeated, unknown = [body for _, body in harness.results][1:]
    assert (repeated["result"], repeated["delivery_claim_token"]) == ({"ok": True}, "tok")
    assert unknown == {
        "status": "failed",
        "result": {"indeterminate": True, "operation": "retry_task"},
        "error": "the agent ended before the command did: outcome unknown",
        "delivery_claim_token": "tok",
    }


def test_ledger_says_started_before_the_side_effect(harness):
    """The ledger says "started" when the adapter is called, and "done" afterwards."""
    seen = []
    harness.host.act = lambda *_: (
        seen.append(harness.disk.store.claim("c-1", 0.0).state) or success()
    )
    harness.run()
    assert seen == [STARTED]
    assert harness.disk.store.claim("c-1", 0.0).state == DONE


def test_command_of_another_process_is_left_alone(harness):
    """Another process's running command gets no result here, its finished one gets its result."""
    entries = {
        "theirs": LedgerEntry("theirs", IN_OTHER_PROCESS, b"", 0.0),
        "done": LedgerEntry("done", DONE, b'{"their":1}', 0.0),
    }
    harness.buffer.claim = lambda key, _provisional: entries[key]
    harness.command(identity="theirs")
    harness.command(identity="done")
    harness.backend.advance(100)
    assert harness.host.calls == []
    assert harness.results == [("done", {"their": 1})]


def test_lost_ledger_does_not_repeat_commands(harness):
    """After the disk failed, this process still knows which commands it has run."""
    harness.command(identity="before")
    harness.backend.advance(1)
    harness.disk.full = True
    harness.command(identity="before")
    harness.command(identity="after")
    harness.command(identity="after")
    harness.backend.advance(1)
    assert len(harness.host.calls) == 2
    rows = harness.buffer.read_next((0, 10, (RESULT,)), (0, 0, ()), 10**6)[0]
    by_key = {row.key: json.loads(row.payload) for row in rows}
    assert "no longer known" in by_key["before"]["error"]
    assert by_key["after"]["status"] == "success"


def test_redelivery_after_result_was_evicted(harness):
    """A redelivered command whose result was evicted from the ledger is not run again."""
    harness.disk.store.settle("c-1", b"", 0.0)
    body = harness.run()
    assert "no longer known" in body["error"]
    assert body["result"]["indeterminate"] is True
    assert harness.host.calls == []


def test_worker_limit_holds(harness):
    """Two workers run two commands at a time, in order of arrival, until all have run."""
    harness.host.seconds = 10
    for number in range(5):
        harness.command(identity=f"c-{number}", parameters={"task_id": str(number)})
    harness.backend.advance(1)
    assert [args for _, args, _ in harness.host.calls] == [("0",), ("1",)]
    harness.backend.advance(40)
    assert [key for key, _ in harness.results] == [f"c-{number}" for number in range(5)]
    harness.command(identity="later")
    harness.backend.advance(11)
    assert len(harness.results) == 6


def test_expired_command_is_not_started(harness):
    """A command whose deadline passes while it waits for a worker is refused and never run."""
    harness.host.seconds = 300
    for number in range(2):
        harness.command(identity=f"hung-{number}", timeout=400)
    for number in range(3):
        harness.command(identity=f"c-{number}", timeout=40 + number)
    harness.backend.advance(38.5)
    assert [(key, body["status"]) for key, body in harness.results] == [("c-0", "failed")]
    harness.backend.advance(3)
    assert "was not started" in dict(harness.results)["c-2"]["error"]
    assert len(harness.host.calls) == 2
    harness.command(identity="c-0")
    harness.backend.advance(700)
    assert len(harness.host.calls) == 2, "a redelivery does not run it either"


def test_hung_command_does_not_block_others():
    """Of fifty commands one hangs: the others finish, and that one has a result in time."""
    harness = CommandHarness(workers=8)
    harness.host.seconds = lambda task: 1000 if task == "7" else 1
    for number in range(50):
        harness.command(identity=f"c-{number}", parameters={"task_id": str(number)})
    assert len(harness.transport.frames("command_ack")) == 50
    harness.backend.advance(10)
    assert {key for key, _ in harness.results} == {
        f"c-{number}" for number in range(50) if number != 7
    }
    harness.backend.advance(49)
    assert dict(harness.results)["c-7"]["error"] == "still running: outcome unknown"


@pytest.mark.parametrize(("timeout", "by"), [(30, 28.1), (4, 3.1), (1, 0.8)])
def test_overrun_is_indeterminate(harness, timeout, by):
    """A command that overruns gets a result in time, and the result says "outcome unknown"."""
    harness.host.seconds = 1000
    harness.command(timeout=timeout)
    harness.backend.advance(by)
    ((_, body),) = harness.results
    assert body["status"] == "failed"
    assert body["result"] == {"indeterminate": True, "operation": "retry_task"}


def test_delayed_frame_has_less_time(harness):
    """The time a frame lay unread is subtracted; a command with no time left is not started."""
    harness.host.seconds = 1000
    harness.command(timeout=30, delay=20.0, identity="late")
    harness.backend.advance(8.1)
    assert [key for key, _ in harness.results] == ["late"]
    harness.command(timeout=30, delay=30.0, identity="expired")
    harness.backend.advance(1)
    assert "was not started: it came too late" in dict(harness.results)["expired"]["error"]
    assert len(harness.host.calls) == 1


def test_stop_refuses_new_commands(harness):
    """After stop() no command begins, and a running one may finish until close()."""
    harness.host.seconds = lambda task: {"0": 5, "1": 20}.get(task, 0)
    harness.disk.store.settle_and_queue("earlier", b'{"status":"success"}', 0.0)
    for number in range(4):
        harness.command(identity=f"c-{number}", parameters={"task_id": str(number)})
    harness.backend.advance(1)
    harness.dispatcher.stop()
    harness.command(identity="c-4")
    harness.command(identity="earlier")
    harness.backend.advance(9)
    assert [(key, body["status"]) for key, body in harness.results] == [
        ("earlier", "success"),
        ("c-2", "failed"),
        ("c-3", "failed"),
        ("c-0", "success"),
        ("c-4", "failed"),
        ("earlier", "success"),
    ]
    assert "was not started: the agent is stopping" in dict(harness.results)["c-4"]["error"]
    harness.dispatcher.close()
    harness.backend.advance(90)
    assert len(harness.host.calls) == 2
    assert len(harness.results) == 6
    assert harness.disk.store.claim("c-1", 0.0).state == STARTED, "the provisional result is kept"


class OffloadTimeoutError(Exception):
    """Each adapter defines an exception of this name."""


@pytest.mark.parametrize(
    ("error", "message", "unknown"),
    [
        (ValueError("odd"), "internal error: ValueError: odd", False),
        (CommandError("not today"), "not today", False),
        (CommandError("perhaps", indeterminate=True), "perhaps", True),
        (Z4JError("broken"), "broken", False),
        (NotImplementedError("no such thing"), "no such thing", False),
        (NotImplementedError(), "retry_task is not supported", False),
        (OffloadTimeoutError(), "outcome unknown", True),
        (ValueError("at redis://me:hunter2@db/0\nline two"), "line two", False),
    ],
)
def test_adapter_error_becomes_failed_result(harness, error, message, unknown):
    """An exception of the adapter becomes a failed result without secrets; the worker goes on."""

    def act(*_):
        raise error

    harness.host.act = act
    body = harness.run()
    assert body["status"] == "failed"
    assert message in body["error"]
    assert "hunter2" not in body["error"]
    assert bool(body["result"] and body["result"]["indeterminate"]) is unknown
    harness.command(identity="next")
    harness.backend.advance(1)
    assert len(harness.results) == 2


def test_killed_worker_releases_its_slot(harness):
    """An exception thrown into a command's greenlet ends only that command."""

    def act(*_):
        raise SystemExit

    harness.host.act = act
    for number in range(2):
        harness.command(identity=f"killed-{number}")
        with pytest.raises(SystemExit):
            harness.backend.advance(1)
    harness.host.act = lambda *_: success()
    harness.command(identity="next")
    harness.backend.advance(1)
    assert [key for key, _ in harness.results] == ["next"]


def test_memory_of_command_ids_is_bounded(harness, monkeypatch):
    """At most MAX_STARTED_IDS ids are kept."""
    monkeypatch.setattr("z4j_bare.commands.dispatcher.MAX_STARTED_IDS", 10)
    for number in range(30):
        harness.command(identity=f"c-{number}")
        harness.backend.advance(1)
    assert len(harness.dispatcher._started_ids) == 10
    assert harness.dispatcher._queued_ids == set()
    assert len(harness.results) == 30


class WithoutText:
    """An object whose ``str`` raises."""

    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (None, "failed", "returned NoneType for a result"),
        (SimpleNamespace(status="maybe", result=None, error=None), "failed", "SimpleNamespace"),
        (SimpleNamespace(status="success", result=[1], error=None), "failed", "SimpleNamespace"),
        (success(rows=["x" * 1000] * 1000), "success", "over the limit of 262144"),
        (success(rows=list(range(60_000)), all=60_000), "success", "more than 50000 values"),
        (success(odd=WithoutText(), nan=float("nan"), text="\ud800", keys={1: 2}), "success", None),
        (SimpleNamespace(status="failed", result=None, error="e" * 20_000), "failed", "e" * 100),
    ],
)
def test_any_return_value_gives_a_result(harness, outcome, status, message):
    """Whatever an adapter returns, one result is stored that the brain accepts."""
    harness.host.act = lambda *_: outcome
    body = harness.run(token="tok")
    assert (body["status"], body["delivery_claim_token"]) == (status, "tok")
    assert message is None or message in (body["error"] or body["result"]["why"])
    assert len(json.dumps(body)) < 300_000


def test_replaced_package_gives_failed_results(harness, monkeypatch):
    """If the executor cannot be imported, the command fails with advice; the next retries."""
    with monkeypatch.context() as changed:
        changed.setattr(
            harness.backend,
            "import_module",
            lambda name: importlib.import_module(f"{name}_of_another_version"),
        )
        body = harness.run(identity="c-1")
    assert body["status"] == "failed"
    assert "executor_of_another_version" in body["error"]
    assert body["error"].endswith("if it was upgraded, restart this process")
    harness.command(identity="c-2")
    harness.backend.advance(1)
    assert harness.results[1][1]["status"] == "success"


def test_cyclic_result_is_shortened(harness):
    """A result that contains itself is replaced by a short one."""
    loop = {}
    loop["self"] = [loop, loop]
    harness.host.act = lambda *_: success(**loop)
    body = harness.run()
    assert (body["status"], body["result"]) == (
        "success",
        {"shortened": True, "why": "the result is of more than 50000 values"},
    )


def test_failing_redaction_sends_status_only(harness):
    """If the redaction fails, only the status is sent, and a note that the reason is lost."""
    harness.host.redactor = SimpleNamespace(scrub=lambda _: 1 / 0)
    harness.host.act = lambda *_: SimpleNamespace(
        status="failed", result={"secret": 1}, error="hunter2"
    )
    body = harness.run()
    assert (body["status"], body["error"]) == (
        "failed",
        "retry_task failed, and the error text is not encodable (ZeroDivisionError)",
    )
    assert body["result"] == {
        "shortened": True,
        "why": "the result is not encodable (ZeroDivisionError)",
    }


def test_shortened_result_is_redacted(harness):
    """The numbers kept from a result that is too large are redacted like the whole result."""
    harness.host.act = lambda *_: success(rows=list(range(60_000)), password=1234, done=5)
    result = harness.run()["result"]
    assert (result["password"], result["done"]) == ("[REDACTED]", 5)


def test_results_are_redacted(harness):
    """A password is hidden both under its key and inside a value; the brain redacts no results."""
    harness.host.act = lambda *_: success(
        password="hunter2", note="postgres://me:hunter2@db/x", plain=[1, "two"]
    )
    body = harness.run()
    assert body["result"] == {"password": "[REDACTED]", "note": "[REDACTED]", "plain": [1, "two"]}
