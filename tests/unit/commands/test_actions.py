"""The actions: which adapter call each makes, and what each refuses without a call."""

import time
from types import SimpleNamespace

import pytest
from z4j_core.models import CommandResult, DeadLetterPage

from tests.support.commands import CommandHarness
from tests.support.engines import FakeEngineHost, success
from z4j_bare.commands.actions import ENGINE_ACTIONS
from z4j_bare.wire import fit
from z4j_bare.wire.command import Command
from z4j_bare.wire.fit import fit_id, fit_name

#: Each action, its parameters as the brain sends them, and the arguments and keywords of the call.
CALLS = [
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
        {"max": 1000, "hints": {"override_args": None, "override_kwargs": None}},
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
def harness():
    return CommandHarness()


@pytest.mark.parametrize(("action", "parameters", "args", "options"), CALLS)
def test_parameters_reach_the_adapter(harness, action, parameters, args, options):
    """Each parameter is passed under the name that the adapter's method uses."""
    assert harness.run(action, parameters)["status"] == "success"
    ((method, given_args, given_options),) = harness.host.calls
    assert (method, given_args) == (action, args)
    assert options.items() <= given_options.items()


def test_dead_letter_page_is_returned(harness):
    """``dlq.list`` passes on queue, limit and cursor, and returns the page as plain JSON."""
    harness.host.act = lambda *_: DeadLetterPage(engine="rq", next_cursor="c2", total=7)
    harness.host.capabilities = lambda: ["list_dead_letters"]
    body = harness.run(
        "dlq.list",
        {"queue": None, "limit": 900, "cursor": "c1"},
        target={"type": "queue", "id": "q"},
    )
    assert harness.host.calls == [("list_dead_letters", ("q",), {"limit": 200, "cursor": "c1"})]
    assert body["result"] == {"entries": [], "next_cursor": "c2", "total": 7, "engine": "rq"}


def test_invalid_dead_letter_page_is_refused(harness):
    """A return value that is not a page becomes a failed result."""
    harness.host.capabilities = lambda: ["list_dead_letters"]
    assert "in place of a page" in harness.run("dlq.list", {})["error"]


def test_target_id_loses_engine_prefix(harness):
    """Without a parameter the task's id is the target's id without its engine prefix."""
    harness.run("cancel_task", {}, target={"type": "task", "id": "celery:t-1"})
    assert harness.host.calls[0][1] == ("t-1",)


LONG_ID, LONG_QUEUE, LONG_NAME = "i" * 250, "q" * 300, "n" * 600

#: Each action, its parameters with changed texts, and the arguments of the call.
CHANGED = [
    ("retry_task", {"task_id": fit_id(LONG_ID, "celery")}, (LONG_ID,)),
    ("cancel_task", {"task_id": fit_id(LONG_ID, "celery")}, (LONG_ID,)),
    ("cancel_task", {"task_id": fit_id("a\0b", "celery")}, ("a\0b",)),
    ("requeue_dead_letter", {"task_id": fit_id(LONG_ID, "celery")}, (LONG_ID,)),
    ("reconcile_task", {"task_id": fit_id(LONG_ID, "celery")}, (LONG_ID,)),
    (
        "bulk_retry",
        {
            "filter": {
                "task_ids": ["t", fit_id(LONG_ID, "celery")],
                "task_priorities": {fit_id(LONG_ID, "celery"): "high"},
            }
        },
        ({"task_ids": ["t", LONG_ID], "task_priorities": {LONG_ID: "high"}},),
    ),
    ("purge_queue", {"queue": fit_name(LONG_QUEUE)}, (LONG_QUEUE,)),
    ("add_consumer", {"worker_name": "w", "queue": fit_name(LONG_QUEUE)}, ("w", LONG_QUEUE)),
    ("cancel_consumer", {"worker_name": "w", "queue": fit_name(LONG_QUEUE)}, ("w", LONG_QUEUE)),
    ("rate_limit", {"task_name": fit_name(LONG_NAME, 500), "rate": "1/s"}, (LONG_NAME, "1/s")),
    ("submit_task", {"name": fit_name(LONG_NAME, 500)}, (LONG_NAME,)),
]


@pytest.mark.parametrize(("action", "parameters", "args"), CHANGED)
def test_changed_ids_and_names_reach_adapter_as_originals(
    harness, monkeypatch, action, parameters, args
):
    """A changed id or name that this process knows is the original again in the call."""
    known = {}
    monkeypatch.setattr(fit, "_originals", known)
    for text in (LONG_ID, "a\0b"):
        fit_id(text, "celery")
    fit_name(LONG_QUEUE)
    fit_name(LONG_NAME, 500)
    result = harness.run(action, {"engine": "celery", **parameters})
    assert result["status"] == "success", result["error"]
    assert harness.host.calls[0][:2] == (action, args)


@pytest.mark.parametrize(("action", "parameters", "args"), CHANGED)
def test_unknown_changed_ids_and_names_are_refused(harness, monkeypatch, action, parameters, args):
    """A changed id or name that this process does not know is refused without a call."""
    monkeypatch.setattr(fit, "_originals", {})
    result = harness.run(action, {"engine": "celery", **parameters})
    assert result["status"] == "failed"
    assert "does not know the original" in result["error"]
    assert harness.host.calls == []


def test_eta_seconds_counts_from_now(harness):
    """``eta_seconds`` becomes a time in seconds since the epoch."""
    before = time.time()
    harness.run("retry_task", {"task_id": "t", "eta_seconds": 60})
    assert before + 60 <= harness.host.calls[0][2]["eta"] <= time.time() + 60


def test_retry_without_support_submits_a_new_task():
    """An engine without retry gets a new task, made of the operator's arguments only."""
    harness = CommandHarness(("arq",))
    harness.host.capabilities = lambda: ["submit_task"]
    parameters = {
        "task_id": "t",
        "task_name": "n",
        "override_args": [1],
        "override_kwargs": {"a": 2},
        "priority": "low",
    }
    harness.run("retry_task", parameters)
    ((method, args, options),) = harness.host.calls
    assert (method, args, options["args"], options["kwargs"], options["priority"]) == (
        "submit_task",
        ("n",),
        (1,),
        {"a": 2},
        "low",
    )
    for number, missing in enumerate(
        ({"task_name": None}, {"override_args": None, "override_kwargs": None})
    ):
        harness.command("retry_task", {**parameters, **missing}, identity=f"missing-{number}")
        harness.backend.advance(1)
        assert "required" in harness.results[-1][1]["error"]
    assert len(harness.host.calls) == 1


@pytest.mark.parametrize(
    ("engine", "priority", "passed"),
    [
        ("dramatiq", "normal", None),
        ("huey", "normal", None),
        ("dramatiq", "high", "high"),
        ("rq", "normal", "normal"),
    ],
)
def test_normal_priority_is_omitted_where_unsupported(engine, priority, passed):
    """The brain's default priority is not passed to an adapter that refuses priorities."""
    harness = CommandHarness((engine,))
    harness.run(
        "retry_task",
        {"task_id": "t", "override_args": [], "override_kwargs": {}, "priority": priority},
    )
    assert harness.host.calls[0][2]["priority"] == passed


@pytest.mark.parametrize(
    ("engine", "key"),
    [("huey", "__z4j_task_name__"), ("dramatiq", "__z4j_actor_name__"), ("rq", None)],
)
def test_task_name_is_passed_as_keyword_argument(engine, key):
    """Huey's and Dramatiq's adapters read the task's name from the keyword arguments."""
    harness = CommandHarness((engine,))
    harness.run(
        "retry_task",
        {"task_id": "t", "task_name": "n", "override_args": [], "override_kwargs": {"a": 1}},
    )
    assert harness.host.calls[0][2]["override_kwargs"] == ({"a": 1, key: "n"} if key else {"a": 1})


@pytest.mark.parametrize(
    ("action", "parameters"),
    [
        ("retry_task", {"task_id": "t"}),
        ("bulk_retry", {"filter": {"task_ids": ["a"]}}),
        ("requeue_dead_letter", {"task_id": "t"}),
    ],
)
def test_old_adapter_is_refused_a_retry(action, parameters):
    """An adapter that would retry with the brain's redacted arguments is not called."""
    harness = CommandHarness(("huey",))
    harness.host.retries_by_reference = False
    assert "upgrade it" in harness.run(action, parameters)["error"]
    assert harness.host.calls == []


@pytest.mark.parametrize("action", ["retry_task", "bulk_retry", "requeue_dead_letter"])
def test_adapter_that_unpickles_is_refused_a_retry(action):
    """An adapter that unpickles tasks is not called; the error says what to upgrade."""
    harness = CommandHarness(("rq",))
    harness.host.retry_problem = "z4j-rq 1.6.0 unpickles: upgrade z4j-rq"
    answer = harness.run(action, {"task_id": "t", "filter": {"task_ids": ["a"]}})
    assert answer["error"] == f"{action}: z4j-rq 1.6.0 unpickles: upgrade z4j-rq"
    assert harness.host.calls == []


def test_bulk_retry_drops_overrides_that_adapter_lacks(harness):
    """The overrides of a bulk retry are omitted if the adapter has none for several tasks."""
    overrides = {"override_args": [1], "override_kwargs": {}}
    harness.run("bulk_retry", {"filter": {"task_ids": ["a"]}, **overrides})
    ((_, _, keywords),) = harness.host.calls
    assert keywords["hints"] == {"override_args": (1,), "override_kwargs": {}}


def test_reconcile_without_method_is_unknown(harness):
    """An adapter that cannot query a task's state gives the state "unknown", not a failure."""
    harness.host.has_method = lambda _: False
    harness.host.capabilities = list
    body = harness.run("reconcile_task", {"task_id": "t"})
    assert (body["status"], body["result"]) == (
        "success",
        {"task_id": "t", "engine_state": "unknown"},
    )


@pytest.mark.parametrize(
    "action", ["pool_grow", "cancel_task", "rate_limit", "restart_worker", "add_consumer"]
)
def test_own_controls_take_precedence(harness, action):
    """Where the agent has controls for the engine, the adapter's methods are not called."""
    harness.host.controls = object()
    harness.host.control = lambda name, *_, **__: success(controlled=name)
    parameters = {"worker_name": "w", "task_id": "t", "task_name": "n", "rate": "1", "queue": "q"}
    assert harness.run(action, parameters)["result"] == {"controlled": action}
    assert harness.host.calls == []


@pytest.mark.parametrize(
    ("engines", "action", "parameters", "message"),
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
        (
            ("celery",),
            "retry_task",
            {"task_id": "t", "override_args": []},
            "must be given together",
        ),
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
def test_invalid_command_is_refused(engines, action, parameters, message):
    """A refused command says why and calls no adapter."""
    harness = CommandHarness(engines)
    body = harness.run(action, parameters)
    assert body["status"] == "failed"
    assert message in body["error"]
    assert all(host.calls == [] for host in harness.hosts.values())


@pytest.mark.parametrize(
    "action", sorted(name for name, action in ENGINE_ACTIONS.items() if action.needs)
)
def test_missing_capability_is_refused(harness, action):
    """An adapter is called only for what its capabilities include."""
    harness.host.capabilities = list
    assert harness.run(action, {})["error"] == f"engine celery does not support {action}"
    assert harness.host.calls == []


def test_engine_is_chosen_by_name():
    """Filter, parameters or target name the engine; different names are refused."""
    harness = CommandHarness(("celery", "rq"))
    harness.command(parameters={"task_id": "a", "engine": "rq"}, identity="1")
    harness.command(target={"engine": "celery"}, identity="2")
    harness.command(
        "bulk_retry",
        {"filter": {"engine": "rq", "task_ids": ["a"]}},
        target={"engine": "rq"},
        identity="3",
    )
    harness.command(
        parameters={"task_id": "a", "engine": "rq"}, target={"engine": "celery"}, identity="4"
    )
    harness.backend.advance(1)
    assert [len(harness.hosts[name].calls) for name in ("celery", "rq")] == [1, 2]
    assert (
        "'rq' in the parameters and 'celery' in the target" in dict(harness.results)["4"]["error"]
    )


def test_only_capable_engine_is_chosen():
    """Without a name the only capable engine is chosen, as for a queue or a rate limit."""
    harness = CommandHarness(("celery", "huey"))
    harness.hosts["huey"].capabilities = lambda: ["submit_task"]
    harness.run("purge_queue", {"queue": "q", "confirm_token": "x"})
    assert len(harness.hosts["celery"].calls) == 1


def test_command_text_skips_other_types():
    """``text`` searches parameters, then target, and skips empty values and other types."""
    command = Command(
        "1", "x", {"task_id": "from-target", "n": 3}, {"task_id": "", "other": "o"}, 0.0
    )
    assert command.text("task_id") == "from-target"
    assert command.text("n", "other") == "o"
    assert command.text("none") is None


def test_fake_host_matches_engine_host():
    """Every public attribute of the fake host exists on the real one."""
    from z4j_bare.engines.host import EngineHost

    bridge = SimpleNamespace(call=lambda function, timeout: function())
    real = EngineHost(
        SimpleNamespace(name="x", capabilities=list, act=lambda: CommandResult(status="success")),
        bridge,
        None,
        print,
    )
    for name in ("name", *vars(FakeEngineHost)):
        assert name.startswith("__") or hasattr(real, name)
    assert real.invoke("act", timeout=1).status == "success"
