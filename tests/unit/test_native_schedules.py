"""Operator changes of schedules in code: stored in a file, merged, and compared before a commit."""

import json
import os
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
from z4j_bare.concurrency import fork
from z4j_bare.interfaces import INativeSchedules
from z4j_bare.native_schedules import control as module

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
    validate=None,
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
        validate=validate or (lambda _: None),
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


def insert(control, *rows):
    """Insert ``(key, body)`` rows as they are."""
    with closing(sqlite3.connect(control.path)) as connection, connection:
        connection.executemany("INSERT INTO overrides VALUES (?, ?)", rows)


def stored(control):
    """Return the rows of the file: the bodies as JSON values, by key."""
    with closing(sqlite3.connect(control.path)) as connection:
        rows = connection.execute("SELECT key, typeof(body), body FROM overrides").fetchall()
    assert {kind for _, kind, _ in rows} <= {"text"}
    return {key: json.loads(body) for key, _, body in rows}


#: A schedule that an operator created under z4j-bare 1.13.0 and then edited, as it is stored.
CREATED = {
    "args": [],
    "catch_up": "skip",
    "created_at": "2026-11-28T21:42:22.522816Z",
    "engine": "huey",
    "expression": "60",
    "external_id": "managed:8aa3fdc0-a98e-4f8b-a544-a0d8ce5da9fd",
    "id": "1fc9f23b-12ef-44b1-aeb8-85987d3fdc8e",
    "is_enabled": True,
    "kind": "interval",
    "kwargs": {"x": 1},
    "last_run_at": None,
    "metadata": {},
    "name": "made",
    "next_run_at": None,
    "overlap_policy": "allow",
    "project_id": "00000000-0000-0000-0000-000000000001",
    "queue": None,
    "scheduler": "beat",
    "source": "beat:override",
    "source_hash": "3f7c2b5e66e552cca65a2dc089eea12038766132bd7778eac38d80b14f5544a8",
    "task_name": "a.task",
    "timezone": "UTC",
    "total_runs": 0,
    "updated_at": "2026-11-28T21:42:22.522816Z",
}
MADE = CREATED["external_id"]


def test_rows_of_z4j_113_are_read_and_changed(control):
    """Paused, created and deleted schedules of z4j 1.13 are effective and can be changed."""
    insert(
        control,
        ("id:hourly", '{"patch":{"is_enabled":false}}'),
        ("id:daily", '{"deleted":true}'),
        (MADE, json.dumps({"created": CREATED, "patch": {"expression": "99"}})),
        ("managed:gone", '{"deleted":true}'),
    )
    schedules = effective(control)
    assert {name: (each.expression, each.is_enabled) for name, each in schedules.items()} == {
        "hourly": ("3600", False),
        "made": ("99", True),
    }
    assert {each.source for each in schedules.values()} == {"beat:override"}
    assert schedules["hourly"].id == CODE[0].id
    assert (schedules["made"].external_id, schedules["made"].kwargs) == (MADE, {"x": 1})
    change(control, "update", MADE, is_enabled=False)
    change(control, "update", "id:hourly", expression="7200")
    made = effective(control)["made"]
    assert (made.expression, made.is_enabled) == ("99", False)
    assert stored(control)["id:hourly"] == {"patch": {"expression": "7200", "is_enabled": False}}
    change(control, "delete", MADE)
    assert set(effective(control)) == {"hourly"}
    assert MADE not in stored(control)


def test_rows_have_layout_of_z4j_113(control):
    """Each change is stored as z4j 1.13 stores it; a schedule that no longer differs has no row."""
    change(control, "update", "id:hourly", is_enabled=False)
    change(control, "delete", "id:daily")
    made = change(control, "create", **NEW)
    rows = stored(control)
    assert rows.pop("id:hourly") == {"patch": {"is_enabled": False}}
    assert rows.pop("id:daily") == {"deleted": True}
    ((key, row),) = rows.items()
    assert key == made.external_id
    assert key.startswith("managed:")
    assert row["patch"] == {}
    assert set(row["created"]) == set(CREATED)
    assert (row["created"]["name"], made.source) == ("new", "beat:override")
    assert made.project_id == CODE[0].project_id
    change(control, "update", "id:hourly", is_enabled=True)
    assert "id:hourly" not in stored(control)
    assert effective(control)["hourly"] == CODE[0]


def test_field_that_differs_only_in_type_is_stored(control):
    """The arguments ``[1]`` and ``[true]`` are different."""
    code = [schedule("counted", args=[1])]
    expected = normalize_external_schedule(code[0].model_dump(mode="json"), owner="beat")
    control.mutate(
        owner="beat",
        operation="update",
        schedule_id="id:counted",
        expected=expected,
        definition={"args": [True]},
        baseline=code,
        validate=lambda _: None,
        engine="huey",
    )
    assert stored(control) == {"id:counted": {"patch": {"args": [True]}}}


def test_new_definitions_in_code_show(control):
    """Fields that no operator changed follow the code; changes of removed schedules are ignored."""
    change(control, "update", "id:hourly", is_enabled=False)
    change(control, "update", "id:hourly", is_enabled=True)
    change(control, "update", "id:daily", is_enabled=False)
    weekly = schedule("weekly")
    deployed = [schedule("hourly", expression="60"), schedule("daily", expression="61"), weekly]
    found = {each.name: each for each in control.resolve(deployed, owner="beat")}
    assert (found["hourly"].expression, found["hourly"].is_enabled) == ("60", True)
    assert (found["daily"].expression, found["daily"].is_enabled) == ("61", False)
    assert control.resolve([weekly], owner="beat") == [weekly]


def test_deleted_schedule_that_returns_to_code_stays_deleted(control):
    """A deletion is effective as long as the code defines the schedule, also after a pause."""
    change(control, "delete", "id:daily")
    assert control.resolve([CODE[0]], owner="beat") == [CODE[0]]
    assert set(effective(control)) == {"hourly"}


def test_odd_names_survive(control):
    """A name with quotes, controls and other scripts is stored and matched."""
    name = "s p'a\"c\\e\u2028/\u00fc\x7f\u4e2d%s{}"
    made = change(control, "create", **{**NEW, "name": name, "kwargs": {name: name}})
    assert change(control, "update", made.external_id, is_enabled=False).kwargs == {name: name}
    assert effective(control)[name].is_enabled is False


BAD_ROWS = [
    "{",
    "[]",
    "5",
    "{}",
    '"x"',
    '{"deleted":false}',
    '{"patch":[1]}',
    '{"patch":{"expression":5}}',
    '{"patch":{"expression":""}}',
    '{"patch":{"kind":"sometimes"}}',
    '{"patch":{"is_enabled":"yes"}}',
    '{"created":[1],"patch":{}}',
    '{"id":1,"task_name":"x","expression":7}',
    "[" * 5000,
    '{"patch":{"args":' + "[" * 800 + "]" * 800 + "}}",
    b"\xff\xfe",
    b"\x00",
]


@pytest.mark.parametrize("body", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_corrupt_row_is_ignored_and_logged_once(control, caplog, body):
    """A row that cannot be read is logged once; the code's schedule is effective and editable."""
    insert(control, ("id:hourly", body), ("managed:none", body), ("id:gone", body))
    insert(control, ("id:daily", '{"patch":{"expression":"7"}}'))
    for _ in range(2):
        assert {each.name: each.expression for each in control.resolve(CODE, owner="beat")} == {
            "hourly": "3600",
            "daily": "7",
        }
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines))
    assert sum("'id:hourly' cannot be read and is ignored" in line for line in lines) == 1
    assert max(map(len, lines)) < 600
    assert change(control, "update", "id:hourly", is_enabled=False).is_enabled is False


def test_key_that_is_no_text_is_ignored(control, caplog):
    """A key that is not UTF-8 does not stop the host."""
    with closing(sqlite3.connect(control.path)) as connection, connection:
        row = "CAST(x'ff' AS TEXT), '{\"patch\":{}}'"
        connection.execute(f"INSERT INTO overrides VALUES ({row})")
    assert control.resolve(CODE, owner="beat") == CODE
    assert caplog.records == []


def test_unknown_field_in_patch_is_ignored(control, caplog):
    """An unknown field of a patch is logged and ignored, and its other fields are effective."""
    insert(control, ("id:hourly", '{"patch":{"expression":"9","jitter":5,"source":"x"},"v":2}'))
    hourly = effective(control)["hourly"]
    assert (hourly.expression, hourly.source) == ("9", "beat:override")
    assert "has unknown fields, which are ignored: jitter, source" in caplog.text
    insert(control, (MADE, json.dumps({"created": {**CREATED, "jitter": 5}})))
    assert effective(control)["made"].kwargs == {"x": 1}


def test_arguments_in_corrupt_row_are_not_logged(control, caplog):
    """The warning about a corrupt row contains none of the row's values."""
    insert(control, ("id:hourly", '{"patch":{"args":"hunter2","expression":["hunter2"]}}'))
    assert effective(control)["hourly"] == CODE[0]
    assert "args: Input should be" in caplog.text
    assert "hunter2" not in caplog.text


def whole(base, **fields):
    """Return a row as earlier releases stored it."""
    return base.model_copy(update=fields).model_dump_json().encode()


def test_rows_of_earlier_releases_are_migrated(control):
    """Rows with a whole schedule or ``null`` are read, and rewritten in the layout of z4j 1.13."""
    made = "beat:z4j:7c0c0b4e-6f0f-4a3e-8a44-1d1d1d1d1d1d"
    insert(
        control,
        ("id:hourly", whole(CODE[0], is_enabled=False)),
        ("id:daily", b"null"),
        (made, whole(CODE[0], name="new", external_id=made, source="beat:dashboard")),
        ("id:gone", whole(schedule("gone"), expression="77")),
    )
    schedules = effective(control)
    assert {name: each.is_enabled for name, each in schedules.items()} == {
        "hourly": False,
        "new": True,
    }
    assert schedules["new"].external_id == made
    rows = stored(control)
    assert rows["id:hourly"] == {"patch": {"is_enabled": False}}
    assert rows["id:daily"] == {"deleted": True}
    assert (set(rows[made]), rows[made]["created"]["name"]) == ({"created", "patch"}, "new")
    assert rows["id:gone"]["patch"]["expression"] == "77"
    assert effective(control) == schedules
    deployed = [schedule("hourly", expression="60"), *CODE[1:]]
    hourly = control.resolve(deployed, owner="beat")[0]
    assert (hourly.expression, hourly.is_enabled) == ("60", False)


def test_unchanged_row_of_earlier_release_is_removed(control):
    """A row with the code's own definition is removed, so that later definitions show."""
    insert(control, ("id:hourly", whole(CODE[0])), ("id:daily", whole(CODE[1], expression="5")))
    change(control, "update", "id:daily", expression="6")
    assert stored(control) == {"id:daily": {"patch": {"expression": "6"}}}


def test_migration_waits_for_no_other_process(control):
    """While another process changes the file, rows of earlier releases are read only."""
    insert(control, ("id:hourly", whole(CODE[0], expression="5")))
    with closing(sqlite3.connect(control.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert effective(control)["hourly"].expression == "5"
        assert time.monotonic() - began < module.BUSY_TIMEOUT / 2
        other.execute("ROLLBACK")
    seen = []
    change(control, "delete", "id:daily", validate=None)
    insert(control, ("id:gone", whole(schedule("gone"))))
    change(control, "create", validate=lambda _: seen.extend(effective(control)), **NEW)
    assert seen == ["hourly"]


def test_stale_change_is_value_error(control):
    """The errors of a change that is not possible are ``ValueError``, as in z4j 1.13."""
    stale = normalize_external_schedule(CODE[1].model_dump(mode="json"), owner="beat")
    for operation, identity, expected, definition in (
        ("update", "id:hourly", stale, {"expression": "1"}),
        ("delete", "id:hourly", stale, {}),
        ("update", "id:none", stale, {"expression": "1"}),
        ("create", None, None, {**NEW, "name": "daily"}),
        ("update", "id:hourly", None, {"name": "daily"}),
    ):
        with pytest.raises(ValueError, match=r"reload|does not exist|already exists"):
            change(control, operation, identity, expected=expected, **definition)
    assert stored(control) == {}


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


class Adapter:
    """An adapter that checks every effective schedule, as those of z4j 1.13 do."""

    name = "beat"

    def __init__(self, control, tasks):
        self._control = control
        self._tasks = tasks
        for each in self.schedules().values():
            self._validate(each)

    def schedules(self):
        return {each.name: each for each in self._control.resolve(CODE, owner=self.name)}

    def _validate(self, schedule):
        if schedule.task_name not in self._tasks:
            raise KeyError("no such task")

    def create(self, **definition):
        return change(self._control, "create", validate=self._validate, **{**NEW, **definition})


#: The tasks of the schedules in code.
TASKS = {each.task_name for each in CODE}


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_created_schedule_without_task_has_no_effect(control, caplog):
    """The host starts, one warning names the schedule and the fix, and the schedule is kept."""
    made = Adapter(control, {*TASKS, "gone"}).create(task_name="gone")
    again = NativeScheduleControl(control.path)
    adapter = Adapter(again, TASKS)
    assert set(adapter.schedules()) == {"hourly", "daily"}
    (warning,) = messages(caplog)
    assert "schedule 'new'" in warning
    assert "of task 'gone' has no effect, because beat refuses it: 'no such task'" in warning
    assert "define the task again, or create the schedule with the same name" in warning
    assert made.external_id in stored(again)
    adapter._tasks = {*TASKS, "gone"}
    assert set(adapter.schedules()) == {"hourly", "daily", "new"}
    assert "has an effect again" in messages(caplog)[1]
    assert len(messages(caplog)) == 2


def test_schedule_created_again_replaces_one_without_task(control):
    """A refused schedule does not return beside a new schedule with its name."""
    Adapter(control, {*TASKS, "gone"}).create(task_name="gone")
    Adapter(control, {*TASKS, "gone"}).create(name="other", task_name="gone")
    adapter = Adapter(NativeScheduleControl(control.path), TASKS)
    made = adapter.create(task_name=CODE[0].task_name)
    adapter._tasks = {*TASKS, "gone"}
    found = adapter.schedules()
    assert set(found) == {"hourly", "daily", "new", "other"}
    assert found["new"] == made


def test_refused_change_of_schedule_in_code_has_no_effect(control, caplog):
    """If the adapter refuses the changed schedule, the code's schedule is effective."""
    change(control, "update", "id:hourly", task_name="gone")
    assert Adapter(control, TASKS).schedules()["hourly"] == CODE[0]
    (warning,) = messages(caplog)
    assert "the stored change of schedule 'id:hourly' has no effect" in warning
    assert "change the schedule again in the dashboard" in warning
    assert change(control, "update", "id:hourly", is_enabled=False).task_name == CODE[0].task_name


def test_check_that_resolves_schedules_ends(control):
    """An adapter may call ``resolve`` in its check."""

    class Resolving(Adapter):
        def _validate(self, schedule):
            assert schedule.name in self.schedules()

    control.resolve(CODE, owner="beat")
    change(control, "create", **NEW)
    assert set(Resolving(control, TASKS).schedules()) == {"hourly", "daily", "new"}


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "no database"])
def test_damaged_file_is_named_with_cure(control, damage):
    """The error about a damaged file is SQLite's error with the file and the fix."""
    change(control, "update", "id:hourly", is_enabled=False)
    content = bytearray(control.path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "overwritten":
        content[4096:8192] = b"x" * 4096
    else:
        content[:] = b"x" * len(content)
    control.path.write_bytes(content)
    with pytest.raises(
        sqlite3.DatabaseError, match="restore it from a backup, or delete"
    ) as caught:
        effective(NativeScheduleControl(control.path))
    assert str(control.path) in str(caught.value)


def test_file_without_tables_gets_them(control):
    """A process of z4j 1.13 that is killed at its first use of the file leaves no tables in it."""
    with closing(sqlite3.connect(control.path)) as connection, connection:
        connection.execute("DROP TABLE identity")
        connection.execute("DROP TABLE overrides")
    again = NativeScheduleControl(control.path)
    assert set(effective(again)) == {"hourly", "daily"}
    assert change(again, "update", "id:hourly", is_enabled=False).is_enabled is False


def test_locked_file_is_named_with_cure(control, monkeypatch):
    """The error about a file that another process has locked names the file."""
    monkeypatch.setattr(module, "BUSY_TIMEOUT", 0.01)
    with closing(sqlite3.connect(control.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            sqlite3.OperationalError, match="database is locked; another process"
        ) as caught:
            change(control, "update", "id:hourly", is_enabled=False)
        other.execute("ROLLBACK")
    assert str(control.path) in str(caught.value)


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
