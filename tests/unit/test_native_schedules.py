"""Changes of schedules that code defines: kept in a file, laid over the code, compared before they are made."""

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
        owner=owner, operation=operation, schedule_id=identity, expected=expected, definition=definition, baseline=CODE, validate=validate, engine="huey",
    )  # fmt: skip


def in_force(control):
    return {each.name: each for each in control.resolve(CODE, owner="beat")}


def test_it_keeps_its_contracts(control):
    """The control keeps INativeSchedules, and z4j_core's protocol of the same methods."""
    assert verifyObject(INativeSchedules, control)
    for method in ("resolve", "mutate"):
        assert callable(getattr(NativeScheduleOverrides, method))


def test_code_alone(control):
    """Without a change the code's schedules are in force."""
    assert control.resolve(CODE, owner="beat") == CODE


def test_changes_survive(control, tmp_path):
    """An update, a deletion and a creation are in force for every control on the file, and for no other scheduler."""
    updated = change(control, "update", "id:hourly", is_enabled=False, expression="7200")
    assert (updated.is_enabled, updated.expression, updated.id) == (False, "7200", CODE[0].id)
    assert change(control, "delete", "id:daily") is None
    made = change(control, "create", **NEW)
    assert (made.engine, made.scheduler, made.kwargs) == ("huey", "beat", {"x": 1})
    again = NativeScheduleControl(tmp_path / "schedules.sqlite")
    assert in_force(again) == {"hourly": updated, "new": made}
    with pytest.raises(ValueError, match="schedules of beat, not of cron"):
        again.resolve(CODE, owner="cron")
    with pytest.raises(ValueError, match="schedules of beat, not of cron"):
        change(again, "create", owner="cron", expected=None, **NEW)
    assert change(again, "delete", made.external_id) is None
    assert set(in_force(again)) == {"hourly"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_no_fork_amid_a_change(backend, control, until, monkeypatch):
    """A child never begins while another thread is inside SQLite for a change: its locks would be shut in it for ever."""
    monkeypatch.setattr(fork, "BUSY_TIMEOUT", 30.0)
    steps = []
    os.register_at_fork(before=partial(steps.append, "fork"))  # the hook that came last runs first

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
    assert set(in_force(control)) == {"hourly", "daily", "new"}


def test_a_validation_may_look(control):
    """Whoever validates a change can ask for the schedules in force, which are those before it."""
    seen = []
    change(control, "create", validate=lambda _: seen.extend(in_force(control)), **NEW)
    assert seen == ["hourly", "daily"]


def test_compare_and_set(control):
    """A schedule that is not as expected, or not there, is left alone."""
    stale = normalize_external_schedule(CODE[0].model_dump(mode="json"), owner="beat")
    change(control, "update", "id:hourly", expression="1")
    with pytest.raises(ConflictError):
        change(control, "update", "id:hourly", expected=stale, expression="2")
    with pytest.raises(NotFoundError):
        change(control, "update", "id:none", expected=stale, expression="2")
    assert in_force(control)["hourly"].expression == "1"


@pytest.mark.parametrize(
    ("operation", "identity", "definition", "complaint"),
    [
        ("pause", "id:hourly", {}, "no change of a schedule"),
        ("update", None, {}, "come with an update"),
        ("create", "id:hourly", NEW, "come with an update"),
        ("update", "id:hourly", {"owner": "x", "source": "y"}, "owner, source cannot be changed"),
        ("delete", "id:hourly", {"name": "x"}, "has no definition"),
        ("update", "id:hourly", {"kind": "sometimes"}, "kind"),
        ("create", None, {"name": "x"}, "task_name"),
        ("update", "id:hourly", {"kwargs": {"x": "y" * module.MAX_RECORD_BYTES}}, "over the limit"),
    ],
)
def test_what_cannot_be(control, operation, identity, definition, complaint):
    """What is no change of an editable field, or no schedule afterwards, changes nothing."""
    with pytest.raises(ValueError, match=complaint):
        control.mutate(
            owner="beat", operation=operation, schedule_id=identity, definition=definition, baseline=CODE, validate=lambda _: None, engine="huey",
            expected=None if identity is None else normalize_external_schedule(CODE[0].model_dump(mode="json"), owner="beat"),
        )  # fmt: skip
    assert control.resolve(CODE, owner="beat") == CODE


def test_names_are_unique(control):
    """A second schedule of a name is refused, by creation and by renaming."""
    with pytest.raises(ConflictError):
        change(control, "create", **{**NEW, "name": "daily"})
    with pytest.raises(ConflictError):
        change(control, "update", "id:hourly", name="daily")


def test_the_adapter_has_the_last_word(control):
    """What the adapter does not accept is not committed."""

    def refuse(each):
        raise ValueError(f"no {each.name}")

    with pytest.raises(ValueError, match="no new"):
        change(control, "create", validate=refuse, **NEW)
    assert control.resolve(CODE, owner="beat") == CODE


def test_limits(control, monkeypatch):
    """More changes, or more bytes of them, than there may be are refused, and the others stay."""
    monkeypatch.setattr(module, "MAX_RECORDS", 1)
    change(control, "create", **NEW)
    with pytest.raises(ValueError, match="over the limit"):
        change(control, "delete", "id:daily")
    assert set(in_force(control)) == {"hourly", "daily", "new"}


def test_the_file_is_private(tmp_path):
    """The file is made for its owner only; one that others can read, that is a link, or that is something else is refused."""
    path = tmp_path / "schedules.sqlite"
    NativeScheduleControl(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link.sqlite").symlink_to(path)
    with pytest.raises(ValueError, match="no regular file"):
        NativeScheduleControl(tmp_path / "link.sqlite")
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        NativeScheduleControl(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    other.chmod(0o600)
    with pytest.raises(ValueError, match="holds something else"):
        NativeScheduleControl(other)


def test_the_existing_file_is_read(tmp_path):
    """A file with z4j 1.13's marks is taken as it is."""
    path = tmp_path / "schedules.sqlite"
    os.close(os.open(path, os.O_CREAT, 0o600))
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE identity (owner TEXT PRIMARY KEY); CREATE TABLE overrides (key TEXT PRIMARY KEY, body BLOB NOT NULL);"
            "PRAGMA application_id = 1513376334; PRAGMA user_version = 1; INSERT INTO identity VALUES ('beat')"
        )
    connection.close()
    change(NativeScheduleControl(path), "delete", "id:daily")
    assert set(in_force(NativeScheduleControl(path))) == {"hourly"}


def test_many_at_once(control):
    """Of many changes from many threads none is lost, and of those that expect the same one is made."""

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
    assert {each.name for each in made} <= set(in_force(control))
    assert len(changed) == 1
    assert in_force(control)["hourly"] == changed[0]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["create", "update", "delete"]), st.sampled_from("abc"), st.booleans()
        ),
        max_size=8,
    )
)
def test_it_is_a_dictionary(tmp_path_factory, steps):
    """Any changes in any order leave what a dictionary of schedules would hold."""
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
        name: (each.external_id, each.is_enabled) for name, each in in_force(control).items()
    } == model
