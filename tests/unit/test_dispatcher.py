"""Commands in virtual time: acknowledged at once, run once, at most so many at a time, answered whatever happens."""

import json
from types import SimpleNamespace

import pytest
from z4j_core.errors import Z4JError

from tests.virtual import World
from z4j_bare.dispatcher import Dispatcher
from z4j_bare.dispatcher.table import ENGINE_ACTIONS, Command, RefusedError


class Host:
    """An engine host whose calls take as long as ``seconds`` says and do what ``act`` does."""

    name = "celery"

    def __init__(self, seam):
        self.calls = []
        self.seconds = 0.0
        self.act = lambda *_: SimpleNamespace(status="success", result={"ok": True}, error=None)
        self._seam = seam

    def capabilities(self):
        return sorted(ENGINE_ACTIONS)

    def invoke(self, method, *args, timeout, **options):
        self.calls.append((method, args, options))
        self._seam.sleep(min(self.seconds, timeout))
        if self.seconds > timeout:
            raise TimeoutError
        return self.act(method, *args)


class Commanded(World):
    def __init__(self, hosts=("celery",), workers=2):
        super().__init__()
        self.hosts = {name: Host(self.seam) for name in hosts}
        self.host = next(iter(self.hosts.values()), None)
        self.answers = []
        self.dispatcher = Dispatcher(self.hosts, lambda key, body: self.answers.append((key, json.loads(body))), self.seam, self.counters, workers)

    def command(self, action="retry_task", parameters=None, *, identity="c-1", target=None, timeout=60, token=None):
        payload = SimpleNamespace(
            action=action, target=target or {}, parameters={"task_id": "t"} if parameters is None else parameters, timeout_seconds=timeout, delivery_claim_token=token
        )
        self.dispatcher.submit(SimpleNamespace(id=identity, payload=payload), self.link)

    def answer(self, *args, **options):
        self.command(*args, **options)
        self.seam.advance(100)
        (answer,) = self.answers
        return answer[1]


@pytest.fixture
def world():
    return Commanded()


def test_acknowledges_first_and_answers_once(world):
    """The ack goes out before the command begins, and the answer carries id and token."""
    world.host.seconds = 5
    world.command(token="tok")
    assert [(frame["id"], frame["payload"]) for frame in world.transport.of("command_ack")] == [("c-1", {"delivery_claim_token": "tok"})]
    assert world.answers == []
    world.seam.advance(6)
    assert world.answers == [("c-1", {"status": "success", "result": {"ok": True}, "error": None, "delivery_claim_token": "tok"})]
    assert world.counters.commands == 1


def test_a_redelivery_runs_nothing(world):
    """However often a command is delivered, while it runs and after, it runs once; every delivery is acknowledged."""
    world.host.seconds = 5
    for _ in range(3):
        world.command()
        world.seam.advance(3)
    assert len(world.host.calls) == 1
    assert len(world.answers) == 1
    assert len(world.transport.of("command_ack")) == 3


def test_so_many_at_a_time(world):
    """Two workers run two commands at a time, in order of arrival, and all get done."""
    world.host.seconds = 10
    for number in range(5):
        world.command(identity=f"c-{number}", parameters={"task_id": str(number)})
    world.seam.advance(1)
    assert [args for _, args, _ in world.host.calls] == [("0",), ("1",)]
    world.seam.advance(40)
    assert [key for key, _ in world.answers] == [f"c-{number}" for number in range(5)]
    world.command(identity="later")
    world.seam.advance(11)
    assert len(world.answers) == 6


def test_what_waited_too_long_is_not_started(world):
    """A command whose deadline passed while it waited for a worker is refused, not run behind the operator's back."""
    world.host.seconds = 50
    for number in range(3):
        world.command(identity=f"c-{number}", timeout=40)
    world.seam.advance(200)
    assert len(world.host.calls) == 2
    assert "was not started" in dict(world.answers)["c-2"]["error"]


def test_an_overrun_is_indeterminate(world):
    """A command that outlives its deadline is answered before the brain stops listening, as of unknown outcome."""
    world.host.seconds = 1000
    world.command(timeout=30)
    world.seam.advance(29)
    ((_, body),) = world.answers
    assert body["status"] == "failed"
    assert body["result"] == {"indeterminate": True, "operation": "retry_task"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("odd"), "internal error: ValueError: odd"),
        (RefusedError("not today"), "not today"),
        (Z4JError("broken"), "broken"),
        (NotImplementedError("no"), "NotImplementedError"),
    ],
)
def test_errors_are_answers(world, error, said):
    """Whatever an adapter raises becomes a failed answer, and the worker goes on."""

    def act(*_):
        raise error

    world.host.act = act
    body = world.answer()
    assert body["status"] == "failed"
    assert said in body["error"]
    world.command(identity="next")
    world.seam.advance(1)
    assert len(world.answers) == 2


@pytest.mark.parametrize(
    ("hosts", "action", "parameters", "said"),
    [
        (("celery",), "no.such", {}, "not supported"),
        (("celery",), "retry_task", {}, "task_id is required"),
        (("celery",), "retry_task", {"task_id": 7}, "task_id is required"),
        (("celery",), "retry_task", {"task_id": "t", "engine": "rq"}, "no engine 'rq', only celery"),
        (("celery", "rq"), "retry_task", {"task_id": "t"}, "no engine None"),
        ((), "retry_task", {"task_id": "t"}, "only none"),
        (("celery",), "retry_task", {"task_id": "t", "override_args": []}, "come together"),
        (("celery",), "submit_task", {}, "name is required"),
        (("celery",), "cancel_task", {"task_id": ""}, "task_id is required"),
    ],
)
def test_refusals(hosts, action, parameters, said):
    """A command that cannot be carried out as it stands says why and calls no adapter."""
    world = Commanded(hosts)
    body = world.answer(action, parameters)
    assert body["status"] == "failed"
    assert said in body["error"]
    assert all(host.calls == [] for host in world.hosts.values())


def test_a_missing_capability_is_a_refusal(world):
    """An engine is only asked for what it says that it can do."""
    world.host.capabilities = lambda: ["submit_task"]
    assert "does not support retry_task" in world.answer()["error"]
    assert world.host.calls == []


def test_the_engine_is_found_by_name():
    """With several engines the command's parameters or target name the one."""
    world = Commanded(("celery", "rq"))
    world.command(parameters={"task_id": "a", "engine": "rq"}, identity="1")
    world.command(target={"engine": "celery"}, identity="2")
    world.seam.advance(1)
    assert [len(world.hosts[name].calls) for name in ("celery", "rq")] == [1, 1]


@pytest.mark.parametrize(
    ("action", "parameters", "args", "options"),
    [
        ("retry_task", {"task_id": "t", "eta": 5}, ("t",), {"eta": 5, "override_args": None}),
        ("retry_task", {"id": "t", "override_args": [1], "override_kwargs": {}}, ("t",), {"override_args": [1], "override_kwargs": {}}),
        ("submit_task", {"name": "shop.pay", "args": [1], "kwargs": {"a": 2}, "queue": "q"}, ("shop.pay",), {"args": (1,), "kwargs": {"a": 2}, "queue": "q"}),
        ("submit_task", {"task_name": "shop.pay"}, ("shop.pay",), {"args": (), "kwargs": {}}),
        ("cancel_task", {"task_id": "t"}, ("t",), {}),
    ],
)
def test_what_adapters_are_asked(world, action, parameters, args, options):
    """Parameters reach the adapter under the names that its methods use."""
    world.answer(action, parameters)
    ((method, given_args, given_options),) = world.host.calls
    assert (method, given_args) == (action, args)
    assert options.items() <= given_options.items()


def test_memory_of_commands_is_bounded(world, monkeypatch):
    """Only so many ids are remembered: an agent that lives for years does not grow."""
    monkeypatch.setattr("z4j_bare.dispatcher.core.REMEMBERED", 10)
    for number in range(30):
        world.command(identity=f"c-{number}")
        world.seam.advance(1)
    assert len(world.dispatcher._seen) == 10
    assert len(world.answers) == 30


def test_parameters_are_read_with_care():
    """A name is looked up in the parameters first, then in the target; empty and foreign types do not count."""
    command = Command("1", "x", {"task_id": "from-target", "n": 3}, {"task_id": "", "other": "o"}, 0.0)
    assert command.text("task_id") == "from-target"
    assert command.text("n", "other") == "o"
    assert command.text("none") is None
