"""The table: what each action asks of an adapter, and what it refuses without asking."""

import time
from types import SimpleNamespace

import pytest
from z4j_core.models import CommandResult, DeadLetterPage

from tests.unit.commands.test_dispatcher import Commanded, Host, success
from z4j_bare.commands.actions import ENGINE_ACTIONS
from z4j_bare.commands.command import Command

#: Parameters of each action as the brain sends them, and the call that they make: method, arguments, keywords.
ASKED = [
    (
        "submit_task",
        {"name": "shop.pay", "args": [1], "kwargs": {"a": 2}, "queue": "q"},
        ("shop.pay",),
        {"args": (1,), "kwargs": {"a": 2}, "queue": "q"},
    ),
    (
        "submit_task",
        {"task_name": "shop.pay"},
        ("shop.pay",),
        {"args": (), "kwargs": {}, "queue": None, "eta": None, "priority": None},
    ),
    (
        "retry_task",
        {"task_id": "t", "eta": 5, "eta_seconds": 9, "priority": "high"},
        ("t",),
        {"eta": 5.0, "priority": "high", "override_args": None, "override_kwargs": None},
    ),
    (
        "retry_task",
        {"task_id": "t", "task_name": "n", "args": [0], "kwargs": {}},
        ("t",),
        {"hints": {"task_name": "n"}, "override_args": None},
    ),
    (
        "retry_task",
        {"id": "t", "override_args": [1], "override_kwargs": {}},
        ("t",),
        {"override_args": (1,), "override_kwargs": {}},
    ),
    ("cancel_task", {"task_id": "t"}, ("t",), {}),
    (
        "bulk_retry",
        {"filter": {"task_ids": ["a"]}},
        ({"task_ids": ["a"]},),
        {"max": 1000, "override_args": None},
    ),
    (
        "bulk_retry",
        {"filter": {"task_ids": ["a"]}, "max": 10**9},
        ({"task_ids": ["a"]},),
        {"max": 10_000},
    ),
    (
        "purge_queue",
        {"queue": "q", "confirm_token": "x", "force": False},
        ("q",),
        {"confirm_token": "x", "force": False},
    ),
    (
        "purge_queue",
        {"queue": "q", "confirm_token": None},
        ("q",),
        {"confirm_token": None, "force": False},
    ),
    (
        "requeue_dead_letter",
        {"task_id": "t"},
        ("t",),
        {"override_args": None, "override_kwargs": None},
    ),
    ("reconcile_task", {"task_id": "t"}, ("t",), {}),
    ("restart_worker", {"worker_name": "w"}, ("w",), {}),
    ("pool_grow", {"worker_name": "w"}, ("w", 1), {}),
    ("pool_shrink", {"worker_name": "w", "delta": 3}, ("w", 3), {}),
    ("add_consumer", {"worker_name": "w", "queue": "q"}, ("w", "q"), {}),
    ("cancel_consumer", {"worker_name": "w", "queue": "q"}, ("w", "q"), {}),
    (
        "rate_limit",
        {"task_name": "n", "rate": "5/m", "worker_name": None},
        ("n", "5/m"),
        {"worker_name": None},
    ),
    (
        "rate_limit",
        {"task_name": "n", "rate": "0", "worker_name": "w"},
        ("n", "0"),
        {"worker_name": "w"},
    ),
]


@pytest.fixture
def world():
    return Commanded()


@pytest.mark.parametrize(("action", "parameters", "args", "options"), ASKED)
def test_what_adapters_are_asked(world, action, parameters, args, options):
    """Parameters reach the adapter under the names that its methods use."""
    assert world.answer(action, parameters)["status"] == "success"
    ((method, given_args, given_options),) = world.host.calls
    assert (method, given_args) == (action, args)
    assert options.items() <= given_options.items()


def test_a_page_of_dead_letters(world):
    """``dlq.list`` passes queue, limit and cursor on, and the page comes back as plain JSON."""
    world.host.act = lambda *_: DeadLetterPage(engine="rq", next_cursor="c2", total=7)
    world.host.capabilities = lambda: ["list_dead_letters"]
    body = world.answer(
        "dlq.list",
        {"queue": None, "limit": 900, "cursor": "c1"},
        target={"type": "queue", "id": "q"},
    )
    assert world.host.calls == [("list_dead_letters", ("q",), {"limit": 200, "cursor": "c1"})]
    assert body["result"] == {"entries": [], "next_cursor": "c2", "total": 7, "engine": "rq"}


def test_a_page_that_is_none(world):
    """What an adapter returns in place of a page is not passed on."""
    world.host.capabilities = lambda: ["list_dead_letters"]
    assert "in place of a page" in world.answer("dlq.list", {})["error"]


def test_the_targets_id_names_the_engine(world):
    """Without a parameter the task's id is the target's, whose engine is taken off."""
    world.answer("cancel_task", {}, target={"type": "task", "id": "celery:t-1"})
    assert world.host.calls[0][1] == ("t-1",)


def test_a_delay_counts_from_now(world):
    """``eta_seconds`` becomes a time."""
    before = time.time()
    world.answer("retry_task", {"task_id": "t", "eta_seconds": 60})
    assert before + 60 <= world.host.calls[0][2]["eta"] <= time.time() + 60


def test_an_engine_that_only_submits():
    """A retry on an engine without one is a new task, from the operator's arguments only."""
    world = Commanded(("arq",))
    world.host.capabilities = lambda: ["submit_task"]
    full = {
        "task_id": "t",
        "task_name": "n",
        "override_args": [1],
        "override_kwargs": {"a": 2},
        "priority": "low",
    }
    world.answer("retry_task", full)
    ((method, args, options),) = world.host.calls
    assert (method, args, options["args"], options["kwargs"], options["priority"]) == (
        "submit_task",
        ("n",),
        (1,),
        {"a": 2},
        "low",
    )
    for number, lacking in enumerate(
        ({"task_name": None}, {"override_args": None, "override_kwargs": None})
    ):
        world.command("retry_task", {**full, **lacking}, identity=f"lacking-{number}")
        world.backend.advance(1)
        assert "required" in world.answers[-1][1]["error"]
    assert len(world.host.calls) == 1


@pytest.mark.parametrize(
    ("engine", "priority", "passed"),
    [
        ("dramatiq", "normal", None),
        ("huey", "normal", None),
        ("dramatiq", "high", "high"),
        ("rq", "normal", "normal"),
    ],
)
def test_a_priority_that_says_nothing(engine, priority, passed):
    """The brain gives every task a priority: an engine that knows none is asked only for one that means something."""
    world = Commanded((engine,))
    world.answer(
        "retry_task",
        {"task_id": "t", "override_args": [], "override_kwargs": {}, "priority": priority},
    )
    assert world.host.calls[0][2]["priority"] == passed


@pytest.mark.parametrize(
    ("engine", "key"),
    [("huey", "__z4j_task_name__"), ("dramatiq", "__z4j_actor_name__"), ("rq", None)],
)
def test_the_tasks_name_travels_where_it_is_looked_for(engine, key):
    """Huey and Dramatiq find the task's name among the keyword arguments."""
    world = Commanded((engine,))
    world.answer(
        "retry_task",
        {"task_id": "t", "task_name": "n", "override_args": [], "override_kwargs": {"a": 1}},
    )
    assert world.host.calls[0][2]["override_kwargs"] == ({"a": 1, key: "n"} if key else {"a": 1})


@pytest.mark.parametrize(
    ("action", "parameters"),
    [
        ("retry_task", {"task_id": "t"}),
        ("bulk_retry", {"filter": {"task_ids": ["a"]}}),
        ("requeue_dead_letter", {"task_id": "t"}),
    ],
)
def test_an_adapter_that_cannot_retry_safely(action, parameters):
    """An old adapter that would use the brain's redacted arguments is refused."""
    world = Commanded(("huey",))
    world.host.retries_by_reference = False
    assert "upgrade it" in world.answer(action, parameters)["error"]
    assert world.host.calls == []


def test_reconciling_without_a_method(world):
    """An engine that cannot tell a task's state knows nothing of it, which is no failure."""
    world.host.offers = lambda _: False
    world.host.capabilities = list
    body = world.answer("reconcile_task", {"task_id": "t"})
    assert (body["status"], body["result"]) == (
        "success",
        {"task_id": "t", "engine_state": "unknown"},
    )


@pytest.mark.parametrize(
    "action", ["pool_grow", "cancel_task", "rate_limit", "restart_worker", "add_consumer"]
)
def test_our_own_controls_come_first(world, action):
    """Where there are controls of our own for the engine, the adapter's are not used."""
    world.host.controls = object()
    world.host.control = lambda name, *_, **__: success(controlled=name)
    parameters = {"worker_name": "w", "task_id": "t", "task_name": "n", "rate": "1", "queue": "q"}
    assert world.answer(action, parameters)["result"] == {"controlled": action}
    assert world.host.calls == []


@pytest.mark.parametrize(
    ("hosts", "action", "parameters", "said"),
    [
        (("celery",), "no.such", {}, "no.such is not an action that this agent knows"),
        (("celery",), "retry_task", {}, "task_id is required"),
        (("celery",), "retry_task", {"task_id": 7}, "task_id is required"),
        (
            ("celery",),
            "retry_task",
            {"task_id": "t", "engine": "rq"},
            "no engine 'rq', only celery",
        ),
        (("celery",), "retry_task", {"task_id": "t", "engine": 7}, "engine must be text"),
        (("celery",), "retry_task", {"task_id": "t", "engine": ""}, "engine must be text"),
        (
            ("celery", "rq"),
            "retry_task",
            {"task_id": "t"},
            "engine is required: this agent has celery, rq",
        ),
        ((), "retry_task", {"task_id": "t"}, "this agent has none"),
        (("celery",), "retry_task", {"task_id": "t", "override_args": []}, "come together"),
        (
            ("celery",),
            "retry_task",
            {"task_id": "t", "override_args": "ab", "override_kwargs": {}},
            "override_args must be a list",
        ),
        (
            ("celery",),
            "retry_task",
            {"task_id": "t", "override_args": [], "override_kwargs": {"__z4j_x__": 1}},
            "reserved",
        ),
        (("celery",), "retry_task", {"task_id": "t", "eta": "soon"}, "eta must be a number"),
        (
            ("celery",),
            "retry_task",
            {"task_id": "t", "eta_seconds": True},
            "eta_seconds must be a number",
        ),
        (("celery",), "retry_task", {"task_id": "t", "priority": 1.5}, "priority must be"),
        (("celery",), "submit_task", {}, "name is required"),
        (("celery",), "submit_task", {"name": "n", "args": {"a": 1}}, "args must be a list"),
        (("celery",), "submit_task", {"name": "n", "kwargs": [1]}, "kwargs must be an object"),
        (("celery",), "submit_task", {"name": "n", "queue": 3}, "queue must be text"),
        (("celery",), "cancel_task", {"task_id": ""}, "task_id is required"),
        (("celery",), "bulk_retry", {}, "filter is required"),
        (("celery",), "bulk_retry", {"filter": ["a"]}, "filter must be an object"),
        (
            ("celery",),
            "bulk_retry",
            {"filter": {"task_ids": ["a"]}, "max": 0},
            "max must be 1 or more",
        ),
        (
            ("celery",),
            "bulk_retry",
            {"filter": {"task_ids": ["a"]}, "max": True},
            "max must be a whole number",
        ),
        (("celery",), "purge_queue", {}, "queue is required"),
        (("celery",), "purge_queue", {"queue": "q", "force": "yes"}, "force must be true or false"),
        (
            ("celery",),
            "purge_queue",
            {"queue": "q", "confirm_token": 5},
            "confirm_token must be text",
        ),
        (("celery",), "pool_grow", {}, "worker_name is required"),
        (
            ("celery",),
            "pool_grow",
            {"worker_name": "w", "delta": "many"},
            "delta must be a whole number",
        ),
        (("celery",), "pool_grow", {"worker_name": "w", "delta": 101}, "delta must be 100 or less"),
        (("celery",), "pool_shrink", {"worker_name": "w", "delta": -1}, "delta must be 1 or more"),
        (("celery",), "add_consumer", {"worker_name": "w"}, "queue is required"),
        (("celery",), "rate_limit", {"task_name": "n"}, "rate is required"),
        (
            ("celery",),
            "rate_limit",
            {"task_name": "n", "rate": "1", "worker_name": 3},
            "worker_name must be text",
        ),
    ],
)
def test_refusals(hosts, action, parameters, said):
    """A command that cannot be carried out as it stands says why and calls no adapter."""
    world = Commanded(hosts)
    body = world.answer(action, parameters)
    assert body["status"] == "failed"
    assert said in body["error"]
    assert all(host.calls == [] for host in world.hosts.values())


@pytest.mark.parametrize(
    "action", sorted(name for name, action in ENGINE_ACTIONS.items() if action.needs)
)
def test_a_missing_capability_is_a_refusal(world, action):
    """An engine is only asked for what it says that it can do."""
    world.host.capabilities = list
    assert world.answer(action, {})["error"] == f"engine celery does not support {action}"
    assert world.host.calls == []


def test_the_engine_is_found_by_name():
    """With several engines the filter, the parameters or the target name the one; two names must agree."""
    world = Commanded(("celery", "rq"))
    world.command(parameters={"task_id": "a", "engine": "rq"}, identity="1")
    world.command(target={"engine": "celery"}, identity="2")
    world.command(
        "bulk_retry",
        {"filter": {"engine": "rq", "task_ids": ["a"]}},
        target={"engine": "rq"},
        identity="3",
    )
    world.command(
        parameters={"task_id": "a", "engine": "rq"}, target={"engine": "celery"}, identity="4"
    )
    world.backend.advance(1)
    assert [len(world.hosts[name].calls) for name in ("celery", "rq")] == [1, 2]
    assert "'rq' in the parameters and 'celery' in the target" in dict(world.answers)["4"]["error"]


def test_the_only_engine_that_can():
    """The brain names no engine for a queue or a rate limit: the only one that can do it is meant."""
    world = Commanded(("celery", "huey"))
    world.hosts["huey"].capabilities = lambda: ["submit_task"]
    world.answer("purge_queue", {"queue": "q", "confirm_token": "x"})
    assert len(world.hosts["celery"].calls) == 1


def test_parameters_are_read_with_care():
    """A name is looked up in the parameters first, then in the target; empty and foreign types do not count."""
    command = Command(
        "1", "x", {"task_id": "from-target", "n": 3}, {"task_id": "", "other": "o"}, 0.0
    )
    assert command.text("task_id") == "from-target"
    assert command.text("n", "other") == "o"
    assert command.text("none") is None


def test_the_host_of_these_tests_is_like_the_real_one():
    """The stand-in has every attribute of an engine host that the dispatcher reads."""
    from z4j_bare.engines.host import EngineHost

    bridge = SimpleNamespace(call=lambda function, timeout: function())
    real = EngineHost(
        SimpleNamespace(name="x", capabilities=list, act=lambda: CommandResult(status="success")),
        bridge,
        None,
        print,
    )
    for name in vars(Host):
        assert name.startswith("__") or hasattr(real, name)
    assert real.invoke("act", timeout=1).status == "success"
