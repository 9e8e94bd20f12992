"""Commands in virtual time: acknowledged at once, run once, at most so many at a time, answered in time whatever happens."""

import importlib
import json
from types import SimpleNamespace

import pytest
from z4j_core.errors import Z4JError
from z4j_core.redaction.engine import RedactionEngine

from tests.support.virtual import World
from z4j_bare.buffer.rows import DONE, IN_OTHER_PROCESS, RESULT, STARTED, LedgerEntry
from z4j_bare.commands import Dispatcher
from z4j_bare.commands.actions import ENGINE_ACTIONS
from z4j_bare.errors import CommandError
from z4j_bare.events.redaction import Redactor


def success(**result):
    return SimpleNamespace(status="success", result=result, error=None)


class Host:
    """An engine host whose calls take as long as ``seconds`` says and do what ``act`` does."""

    name = "celery"
    controls = process_restart = None
    retries_by_reference = True
    redactor = Redactor(RedactionEngine())

    def __init__(self, backend):
        self.calls = []
        self.seconds = 0.0
        self.act = lambda *_: success(ok=True)
        self._backend = backend

    def capabilities(self):
        return sorted(ENGINE_ACTIONS)

    def offers(self, _method):
        return True

    def invoke(self, method, *args, timeout, **options):
        self.calls.append((method, args, options))
        seconds = self.seconds(*args) if callable(self.seconds) else self.seconds
        self._backend.sleep(min(seconds, timeout))
        if seconds > timeout:
            raise TimeoutError
        return self.act(method, *args)


class Commanded(World):
    """A dispatcher over a real keeper; ``new_process`` is the next one on the same disk."""

    def __init__(self, hosts=("celery",), workers=2):
        super().__init__()
        self.hosts = {name: Host(self.backend) for name in hosts}
        for name, host in self.hosts.items():
            host.name = name
        self.host = next(iter(self.hosts.values()), None)
        self.woken = 0
        self.workers = workers
        self.new_process()

    def new_process(self):
        self.dispatcher = Dispatcher(
            self.hosts, self.buffer, self._wake, self.backend, self.counters, self.workers
        )

    def _wake(self):
        self.woken += 1

    @property
    def answers(self):
        """All answers that were stored for sending, in order."""
        rows = self.disk.store.drain(0, 10_000, 10**9, (RESULT,))
        return [(row.key, json.loads(row.payload)) for row in rows]

    def command(
        self,
        action="retry_task",
        parameters=None,
        *,
        identity="c-1",
        target=None,
        timeout=60,
        token=None,
        late=0.0,
    ):
        payload = SimpleNamespace(
            action=action,
            target=target or {},
            parameters={"task_id": "t"} if parameters is None else parameters,
            timeout_seconds=timeout,
            delivery_claim_token=token,
        )
        self.dispatcher.submit(SimpleNamespace(id=identity, payload=payload), self.link, late)

    def answer(self, *args, **options):
        self.command(*args, **options)
        self.backend.advance(100)
        (answer,) = self.answers
        return answer[1]


@pytest.fixture
def world():
    return Commanded()


def test_acknowledges_first_and_answers_once(world):
    """The ack goes out before the command begins, and the answer carries id and token and wakes the sender."""
    world.host.seconds = 5
    world.command(token="tok")
    assert [(frame["id"], frame["payload"]) for frame in world.transport.of("command_ack")] == [
        ("c-1", {"delivery_claim_token": "tok"})
    ]
    assert world.answers == []
    world.backend.advance(6)
    assert world.answers == [
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
    assert (world.counters.commands, world.woken) == (1, 1)


def test_a_redelivery_runs_nothing(world):
    """A command delivered again while it runs is acknowledged; after that it is answered as before; it runs once."""
    world.host.seconds = 5
    for _ in range(3):
        world.command()
        world.backend.advance(3)
    assert len(world.host.calls) == 1
    assert len(world.transport.of("command_ack")) == 3
    assert [body["result"] for _, body in world.answers] == [{"ok": True}] * 2


def test_the_next_process_answers_what_this_one_did(world):
    """The ledger outlives the process: what was done is answered as it was, what was only begun as indeterminate."""
    world.command(identity="done", token="tok")
    world.backend.advance(1)
    world.host.seconds = 1000
    world.command(identity="begun", token="tok")
    world.backend.advance(1)
    assert world.disk.store.claim("begun", 0.0).state == STARTED
    assert world.disk.store.claim("done", 0.0).state == DONE
    world.new_process()
    for identity in ("done", "begun"):
        world.command(identity=identity)
    world.backend.advance(1)
    assert len(world.host.calls) == 2
    again, unknown = [body for _, body in world.answers][1:]
    assert (again["result"], again["delivery_claim_token"]) == ({"ok": True}, "tok")
    assert unknown == {
        "status": "failed",
        "result": {"indeterminate": True, "operation": "retry_task"},
        "error": "the agent ended before the command did: outcome unknown",
        "delivery_claim_token": "tok",
    }


def test_begun_is_committed_before_the_side_effect(world):
    """At the moment of the adapter's call the ledger says started, and afterwards done."""
    seen = []
    world.host.act = lambda *_: seen.append(world.disk.store.claim("c-1", 0.0).state) or success()
    world.answer()
    assert seen == [STARTED]
    assert world.disk.store.claim("c-1", 0.0).state == DONE


def test_another_process_has_it(world):
    """A command that another process has begun is left to that one; what another has done is answered for it."""
    entries = {
        "theirs": LedgerEntry("theirs", IN_OTHER_PROCESS, b"", 0.0),
        "done": LedgerEntry("done", DONE, b'{"their":1}', 0.0),
    }
    world.buffer.claim = lambda key, _testament: entries[key]
    world.command(identity="theirs")
    world.command(identity="done")
    world.backend.advance(100)
    assert world.host.calls == []
    assert world.answers == [("done", {"their": 1})]


def test_a_ledger_that_was_lost(world):
    """When the disk fails and the ledger begins anew in memory, this process still knows what it has done."""
    world.command(identity="before")
    world.backend.advance(1)
    world.disk.full = True
    world.command(identity="before")
    world.command(identity="after")
    world.command(identity="after")
    world.backend.advance(1)
    assert len(world.host.calls) == 2
    rows = world.buffer.read_next((0, 10, (RESULT,)), (0, 0, ()), 10**6)[0]
    by_key = {row.key: json.loads(row.payload) for row in rows}
    assert "no longer known" in by_key["before"]["error"]
    assert by_key["after"]["status"] == "success"


def test_a_result_that_made_room(world):
    """A redelivery whose stored result had to make room runs nothing either."""
    world.disk.store.settle("c-1", b"", 0.0)
    body = world.answer()
    assert "no longer known" in body["error"]
    assert body["result"]["indeterminate"] is True
    assert world.host.calls == []


def test_so_many_at_a_time(world):
    """Two workers run two commands at a time, in order of arrival, and all get done."""
    world.host.seconds = 10
    for number in range(5):
        world.command(identity=f"c-{number}", parameters={"task_id": str(number)})
    world.backend.advance(1)
    assert [args for _, args, _ in world.host.calls] == [("0",), ("1",)]
    world.backend.advance(40)
    assert [key for key, _ in world.answers] == [f"c-{number}" for number in range(5)]
    world.command(identity="later")
    world.backend.advance(11)
    assert len(world.answers) == 6


def test_what_waited_too_long_is_not_started(world):
    """A command whose time passed while it waited for a worker is refused in time, not run behind the operator's back."""
    world.host.seconds = 300
    for number in range(2):
        world.command(identity=f"hung-{number}", timeout=400)
    for number in range(3):
        world.command(identity=f"c-{number}", timeout=40 + number)
    world.backend.advance(38.5)
    assert [(key, body["status"]) for key, body in world.answers] == [("c-0", "failed")]
    world.backend.advance(3)
    assert "was not started" in dict(world.answers)["c-2"]["error"]
    assert len(world.host.calls) == 2
    world.command(identity="c-0")
    world.backend.advance(700)
    assert len(world.host.calls) == 2, "nor when it comes again"


def test_fifty_at_once_and_one_hangs():
    """Of fifty commands one hangs: the others are answered meanwhile, and that one before its time is up."""
    world = Commanded(workers=8)
    world.host.seconds = lambda task: 1000 if task == "7" else 1
    for number in range(50):
        world.command(identity=f"c-{number}", parameters={"task_id": str(number)})
    assert len(world.transport.of("command_ack")) == 50
    world.backend.advance(10)
    assert {key for key, _ in world.answers} == {
        f"c-{number}" for number in range(50) if number != 7
    }
    world.backend.advance(49)
    assert dict(world.answers)["c-7"]["error"] == "still running: outcome unknown"


@pytest.mark.parametrize(("timeout", "by"), [(30, 28.1), (4, 3.1), (1, 0.8)])
def test_an_overrun_is_indeterminate(world, timeout, by):
    """A command that outlives its time is answered before the brain stops listening, as of unknown outcome."""
    world.host.seconds = 1000
    world.command(timeout=timeout)
    world.backend.advance(by)
    ((_, body),) = world.answers
    assert body["status"] == "failed"
    assert body["result"] == {"indeterminate": True, "operation": "retry_task"}


def test_what_was_read_late_has_less_time(world):
    """A frame that lay unread takes its delay off its time; one that is as old as its time is not started."""
    world.host.seconds = 1000
    world.command(timeout=30, late=20.0, identity="late")
    world.backend.advance(8.1)
    assert [key for key, _ in world.answers] == ["late"]
    world.command(timeout=30, late=30.0, identity="expired")
    world.backend.advance(1)
    assert "was not started: it came too late" in dict(world.answers)["expired"]["error"]
    assert len(world.host.calls) == 1


def test_stopping(world):
    """After stop() nothing begins: what waits or comes is answered as not started, and what runs may end until end()."""
    world.host.seconds = lambda task: {"0": 5, "1": 20}.get(task, 0)
    world.disk.store.answer("earlier", b'{"status":"success"}', 0.0)
    for number in range(4):
        world.command(identity=f"c-{number}", parameters={"task_id": str(number)})
    world.backend.advance(1)
    world.dispatcher.stop()
    world.command(identity="c-4")
    world.command(identity="earlier")
    world.backend.advance(9)
    assert [(key, body["status"]) for key, body in world.answers] == [
        ("earlier", "success"),
        ("c-2", "failed"),
        ("c-3", "failed"),
        ("c-0", "success"),
        ("c-4", "failed"),
        ("earlier", "success"),
    ]
    assert "was not started: the agent is stopping" in dict(world.answers)["c-4"]["error"]
    world.dispatcher.end()
    world.backend.advance(90)
    assert len(world.host.calls) == 2
    assert len(world.answers) == 6
    assert world.disk.store.claim("c-1", 0.0).state == STARTED, "its testament is there for an heir"


class OffloadTimeoutError(Exception):
    """As each adapter has its own."""


@pytest.mark.parametrize(
    ("error", "said", "unknown"),
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
def test_errors_are_answers(world, error, said, unknown):
    """Whatever an adapter raises becomes a failed answer without secrets in it, and the worker goes on."""

    def act(*_):
        raise error

    world.host.act = act
    body = world.answer()
    assert body["status"] == "failed"
    assert said in body["error"]
    assert "hunter2" not in body["error"]
    assert bool(body["result"] and body["result"]["indeterminate"]) is unknown
    world.command(identity="next")
    world.backend.advance(1)
    assert len(world.answers) == 2


def test_a_worker_that_is_killed_gives_its_place_back(world):
    """What is thrown into a command's greenlet ends that command only."""

    def act(*_):
        raise SystemExit

    world.host.act = act
    for number in range(2):
        world.command(identity=f"killed-{number}")
        with pytest.raises(SystemExit):
            world.backend.advance(1)
    world.host.act = lambda *_: success()
    world.command(identity="next")
    world.backend.advance(1)
    assert [key for key, _ in world.answers] == ["next"]


def test_memory_of_commands_is_bounded(world, monkeypatch):
    """Only so many ids are remembered: an agent that lives for years does not grow."""
    monkeypatch.setattr("z4j_bare.commands.dispatcher.REMEMBERED", 10)
    for number in range(30):
        world.command(identity=f"c-{number}")
        world.backend.advance(1)
    assert len(world.dispatcher._begun) == 10
    assert world.dispatcher._present == set()
    assert len(world.answers) == 30


class Odd:
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, "failed", "returned NoneType for a result"),
        (SimpleNamespace(status="maybe", result=None, error=None), "failed", "SimpleNamespace"),
        (SimpleNamespace(status="success", result=[1], error=None), "failed", "SimpleNamespace"),
        (success(rows=["x" * 1000] * 1000), "success", "over the limit of 262144"),
        (success(rows=list(range(60_000)), all=60_000), "success", "more than 50000 values"),
        (success(odd=Odd(), nan=float("nan"), text="\ud800", keys={1: 2}), "success", None),
        (SimpleNamespace(status="failed", result=None, error="e" * 20_000), "failed", "e" * 100),
    ],
)
def test_every_outcome_is_sent(world, outcome, status, said):
    """Whatever an adapter returns, one answer goes out, and it is one that the brain takes."""
    world.host.act = lambda *_: outcome
    body = world.answer(token="tok")
    assert (body["status"], body["delivery_claim_token"]) == (status, "tok")
    assert said is None or said in (body["error"] or body["result"]["why"])
    assert len(json.dumps(body)) < 300_000


def test_files_that_are_not_those_of_the_start(world, monkeypatch):
    """What carries out commands is loaded with the first: if that fails, each command is answered with the cure, and none waits."""
    with monkeypatch.context() as changed:
        changed.setattr(
            world.backend,
            "load",
            lambda name: importlib.import_module(f"{name}_of_another_version"),
        )
        said = world.answer(identity="c-1")
    assert said["status"] == "failed"
    assert "executor_of_another_version" in said["error"]
    assert said["error"].endswith("if it was upgraded, restart this process")
    world.command(identity="c-2")
    world.backend.advance(1)
    assert world.answers[1][1]["status"] == "success"


def test_a_result_that_goes_round_in_circles(world):
    """A result that contains itself becomes a short one."""
    loop = {}
    loop["self"] = [loop, loop]
    world.host.act = lambda *_: success(**loop)
    body = world.answer()
    assert (body["status"], body["result"]) == (
        "success",
        {"shortened": True, "why": "the result is of more than 50000 values"},
    )


def test_a_failure_that_cannot_be_told(world):
    """Where the redaction itself fails nothing unredacted leaves: the status does, and that the reason is lost."""
    world.host.redactor = SimpleNamespace(scrub=lambda _: 1 / 0)
    world.host.act = lambda *_: SimpleNamespace(
        status="failed", result={"secret": 1}, error="hunter2"
    )
    body = world.answer()
    assert (body["status"], body["error"]) == (
        "failed",
        "retry_task failed, and the reason is not to be encoded (ZeroDivisionError)",
    )
    assert body["result"] == {
        "shortened": True,
        "why": "the result is not to be encoded (ZeroDivisionError)",
    }


def test_numbers_of_a_large_result_are_redacted(world):
    """What is kept of a result that is too large is redacted as the whole of it would have been."""
    world.host.act = lambda *_: success(rows=list(range(60_000)), password=1234, done=5)
    result = world.answer()["result"]
    assert (result["password"], result["done"]) == ("[REDACTED]", 5)


def test_results_are_redacted(world):
    """The brain redacts no results, so a password leaves neither under its key nor in a value."""
    world.host.act = lambda *_: success(
        password="hunter2", note="postgres://me:hunter2@db/x", plain=[1, "two"]
    )
    body = world.answer()
    assert body["result"] == {"password": "[REDACTED]", "note": "[REDACTED]", "plain": [1, "two"]}
