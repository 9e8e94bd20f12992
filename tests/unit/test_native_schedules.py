"""Operator changes of schedules in code: stored in a file, merged, and compared before a commit."""

import os
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from z4j_core.errors import ConflictError, NotFoundError
from z4j_core.protocols.scheduler import NativeScheduleOverrides
from z4j_core.schedule_external import normalize_external_schedule
from zope.interface.verify import verifyObject

from tests.support.streams import schedule
from z4j_bare import NativeScheduleControl
from z4j_bare import native_schedules as module
from z4j_bare.concurrency import fork
from z4j_bare.interfaces import INativeSchedules

CODE = [schedule("hourly"), schedule("daily", expression="86400")]
NEW = {
    "name": "new",
    "task_name": "a.task",
    "kind": "interval",
    "expression": "60",
    "kwargs": {"x": 1},
}


@pytest.fixture
def control(tmp_path):
    return NativeScheduleControl(tmp_path / "schedules.sqlite")


def change(
    control,
    operation,
    identity=None,
    *,
    validate=lambda _: None,
    expected=None,
    owner="beat",
    **definition,
):
    if identity is not None and expected is None:
        current = {each.external_id: each for each in control.resolve(CODE, owner=owner)}
        expected = (
            normalize_external_schedule(current[identity].model_dump(mode="json"), owner="beat")
            if identity in current
            else {}
        )
    return control.mutate(
        owner=owner,
        operation=operation,
        schedule_id=identity,
        expected=expected,
        definition=definition,
        baseline=CODE,
        validate=validate,
        engine="huey",
    )


def effective(control):
    return {each.name: each for each in control.resolve(CODE, owner="beat")}


def test_control_satisfies_contracts(control):
    """The control provides INativeSchedules and the methods of z4j_core's protocol."""
    assert verifyObject(INativeSchedules, control)
    for method in ("resolve", "mutate"):
        assert callable(getattr(NativeScheduleOverrides, method))


def test_schedules_without_changes_are_those_of_code(control):
    """Without a stored change the code's schedules are effective."""
    assert control.resolve(CODE, owner="beat") == CODE


def test_changes_apply_to_every_control_of_owner(control, tmp_path):
    """Stored changes are effective for every control on the file, but for no other scheduler."""
    updated = change(control, "update", "id:hourly", is_enabled=False, expression="7200")
    assert (updated.is_enabled, updated.expression, updated.id) == (False, "7200", CODE[0].id)
    assert change(control, "delete", "id:daily") is None
    made = change(control, "create", **NEW)
    assert (made.engine, made.scheduler, made.kwargs) == ("huey", "beat", {"x": 1})
    again = NativeScheduleControl(tmp_path / "schedules.sqlite")
    assert effective(again) == {"hourly": updated, "new": made}
    with pytest.raises(ValueError, match="schedules of beat, not of cron"):
        again.resolve(CODE, owner="cron")
    with pytest.raises(ValueError, match="schedules of beat, not of cron"):
        change(again, "create", owner="cron", expected=None, **NEW)
    assert change(again, "delete", made.external_id) is None
    assert set(effective(again)) == {"hourly"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_waits_for_running_change(backend, control, until, monkeypatch):
    """A fork waits while a thread is in SQLite, because the child could not release its locks."""
    monkeypatch.setattr(fork, "STORE_TIMEOUT", 30.0)
    steps = []
    os.register_at_fork(before=partial(steps.append, "fork"))  # the latest hook runs first

    def slow(_):
        steps.append("in")
        while "fork" not in steps:
            pass
        end = time.perf_counter() + 0.05
        while time.perf_counter() < end:
            pass
        steps.append("out")

    def work(_sleep=None):
        change(control, "create", validate=slow, **NEW)

    if not backend.start_native_thread(work):
        backend.spawn(work, name="change")
    until(lambda: steps)
    pid = os.fork()
    if not pid:
        os._exit(0 if steps == ["in", "fork", "out"] and control.resolve(CODE, owner="beat") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert set(effective(control)) == {"hourly", "daily", "new"}


def test_validate_may_resolve_schedules(control):
    """``validate`` may call ``resolve``, which returns the schedules before the change."""
    seen = []
    change(control, "create", validate=lambda _: seen.extend(effective(control)), **NEW)
    assert seen == ["hourly", "daily"]


def test_change_of_unexpected_schedule_is_rejected(control):
    """A schedule that differs from the expected one, or does not exist, is not changed."""
    stale = normalize_external_schedule(CODE[0].model_dump(mode="json"), owner="beat")
    change(control, "update", "id:hourly", expression="1")
    with pytest.raises(ConflictError):
        change(control, "update", "id:hourly", expected=stale, expression="2")
    with pytest.raises(NotFoundError):
        change(control, "update", "id:none", expected=stale, expression="2")
    assert effective(control)["hourly"].expression == "1"


@pytest.mark.parametrize(
    ("operation", "identity", "definition", "message"),
    [
        ("pause", "id:hourly", {}, "not an operation"),
        ("update", None, {}, "required for update"),
        ("create", "id:hourly", NEW, "not allowed for create"),
        ("update", "id:hourly", {"owner": "x", "source": "y"}, "owner, source cannot be changed"),
        ("delete", "id:hourly", {"name": "x"}, "takes no definition"),
        ("update", "id:hourly", {"kind": "sometimes"}, "kind"),
        ("create", None, {"name": "x"}, "task_name"),
        ("update", "id:hourly", {"kwargs": {"x": "y" * module.MAX_RECORD_BYTES}}, "over the limit"),
    ],
)
def test_invalid_change_is_rejected(control, operation, identity, definition, message):
    """An invalid operation, field or definition raises an error and changes nothing."""
    with pytest.raises(ValueError, match=message):
        control.mutate(
            owner="beat",
            operation=operation,
            schedule_id=identity,
            definition=definition,
            baseline=CODE,
            validate=lambda _: None,
            engine="huey",
            expected=None
            if identity is None
            else normalize_external_schedule(CODE[0].model_dump(mode="json"), owner="beat"),
        )
    assert control.resolve(CODE, owner="beat") == CODE


def test_duplicate_name_is_rejected(control):
    """A name that is taken is rejected for a creation and for a renaming."""
    with pytest.raises(ConflictError):
        change(control, "create", **{**NEW, "name": "daily"})
    with pytest.raises(ConflictError):
        change(control, "update", "id:hourly", name="daily")


def test_change_rejected_by_validate_is_not_committed(control):
    """A change that ``validate`` rejects is not committed."""

    def refuse(each):
        raise ValueError(f"no {each.name}")

    with pytest.raises(ValueError, match="no new"):
        change(control, "create", validate=refuse, **NEW)
    assert control.resolve(CODE, owner="beat") == CODE


def test_change_over_limit_is_rejected(control, monkeypatch):
    """A change over the limit is rejected, and the stored changes stay."""
    monkeypatch.setattr(module, "MAX_RECORDS", 1)
    change(control, "create", **NEW)
    with pytest.raises(ValueError, match="over the limit"):
        change(control, "delete", "id:daily")
    assert set(effective(control)) == {"hourly", "daily", "new"}


def test_unsafe_or_foreign_file_is_rejected(tmp_path):
    """The file has mode 0600; a readable file, a link and another database are rejected."""
    path = tmp_path / "schedules.sqlite"
    NativeScheduleControl(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link.sqlite").symlink_to(path)
    with pytest.raises(ValueError, match="not a regular file"):
        NativeScheduleControl(tmp_path / "link.sqlite")
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        NativeScheduleControl(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    other.chmod(0o600)
    with pytest.raises(ValueError, match="not a schedule file"):
        NativeScheduleControl(other)


def test_file_of_z4j_113_is_read(tmp_path):
    """A file with the schema and ids of z4j 1.13 is used as it is."""
    path = tmp_path / "schedules.sqlite"
    os.close(os.open(path, os.O_CREAT, 0o600))
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE identity (owner TEXT PRIMARY KEY);"
            "CREATE TABLE overrides (key TEXT PRIMARY KEY, body BLOB NOT NULL);"
            "PRAGMA application_id = 1513376334; PRAGMA user_version = 1;"
            "INSERT INTO identity VALUES ('beat')"
        )
    connection.close()
    change(NativeScheduleControl(path), "delete", "id:daily")
    assert set(effective(NativeScheduleControl(path))) == {"hourly"}


def test_concurrent_changes_are_serialised(control):
    """No concurrent creation is lost, and one of several conflicting updates succeeds."""

    def create(number):
        return change(control, "create", **{**NEW, "name": f"n{number}"})

    expected = normalize_external_schedule(CODE[0].model_dump(mode="json"), owner="beat")

    def update(number):
        try:
            return change(control, "update", "id:hourly", expected=expected, expression=str(number))
        except ConflictError:
            return None

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(create, range(8)))
        changed = [each for each in pool.map(update, range(4)) if each]
    assert {each.name for each in made} <= set(effective(control))
    assert len(changed) == 1
    assert effective(control)["hourly"] == changed[0]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["create", "update", "delete"]), st.sampled_from("abc"), st.booleans()
        ),
        max_size=8,
    )
)
def test_random_changes_match_dictionary_model(tmp_path_factory, steps):
    """Any sequence of changes has the effect that it has on a dictionary."""
    control = NativeScheduleControl(tmp_path_factory.mktemp("native") / "s.sqlite")
    model = {each.name: (each.external_id, each.is_enabled) for each in CODE}
    for operation, name, on in steps:
        if operation == "create" and name not in model:
            made = change(control, "create", **{**NEW, "name": name, "is_enabled": on})
            model[name] = (made.external_id, on)
        elif operation == "update" and name in model:
            change(control, "update", model[name][0], is_enabled=on)
            model[name] = (model[name][0], on)
        elif operation == "delete" and name in model:
            change(control, "delete", model.pop(name)[0])
    assert {
        name: (each.external_id, each.is_enabled) for name, each in effective(control).items()
    } == model
