"""The state directory of a user without a usable home directory, and its replacement."""

import os
import pwd
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from z4j_core.models import Event, EventKind
from z4j_core.paths import z4j_home

from tests.support.engines import FakeEngine
from tests.support.environment import set_connection
from z4j_bare import _process_singleton as singleton
from z4j_bare import control, diagnostics, home, install_agent, runtime
from z4j_bare.cli import configuration
from z4j_bare.home import ensure_home, settle_home, take_notice

ME = f"z4j-{os.geteuid()}"


@pytest.fixture(autouse=True)
def unsettled(monkeypatch, tmp_path):
    """No directory is settled, Z4J_HOME is not set, and the temporary directory is the test's."""
    monkeypatch.setattr(home, "_settled", None)
    monkeypatch.setattr(home, "_replacement", None)
    monkeypatch.setattr(home, "_noticed", False)
    monkeypatch.delenv("Z4J_HOME")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()


@pytest.fixture
def no_home(monkeypatch):
    """A user with neither HOME nor an entry in the password database."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def bad_home(monkeypatch, tmp_path):
    """HOME is below a file, so that root can create nothing in it either."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    return tmp_path / "file" / ".z4j"


@pytest.fixture
def installed(monkeypatch):
    """``installed()``: install an agent that finds no brain; it is stopped at the end."""
    singleton.clear_runtime()
    set_connection(monkeypatch, "http://127.0.0.1:9")
    yield lambda **given: install_agent(engines=[FakeEngine("retry_task")], **given)
    left = singleton.current_runtime()
    if left is not None:
        left.stop(timeout=2)
    singleton.clear_runtime()


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]


@pytest.mark.parametrize("name", ["HOME", "Z4J_HOME"])
def test_usable_home_is_kept(monkeypatch, tmp_path, name):
    """A directory that can be created is used, not created, and not exported."""
    monkeypatch.setenv("HOME", str(tmp_path / "new" / "user"))
    if name == "Z4J_HOME":
        monkeypatch.setenv("Z4J_HOME", str(tmp_path / "new" / "user" / ".z4j"))
    expected = tmp_path / "new" / "user" / ".z4j"
    assert settle_home() == expected
    assert not (tmp_path / "new").exists()
    assert os.environ.get("Z4J_HOME") == (str(expected) if name == "Z4J_HOME" else None)
    assert (home.replacement(), take_notice()) == (None, "")


def test_user_without_home_gets_directory_in_temporary_one(no_home, tmp_path):
    """z4j_core, child processes and every module of this package use the same private directory."""
    with pytest.raises(RuntimeError):
        z4j_home()
    directory = settle_home()
    assert directory == tmp_path / "tmp" / ME
    assert directory.stat().st_mode & 0o777 == 0o700
    assert z4j_home() == control._runtime_dir() == configuration.home() == directory
    assert os.environ["Z4J_HOME"] == str(directory)
    assert f"Z4J_HOME is not set, and uid {os.geteuid()} has no home directory" in take_notice()


def test_home_that_cannot_be_written_is_replaced(bad_home, tmp_path):
    """The notice names the directory, the reason and the setting, and is returned once."""
    assert settle_home() == z4j_home() == tmp_path / "tmp" / ME
    notice = take_notice()
    assert f"cannot write to {bad_home} (Not a directory)" in notice
    assert "Set Z4J_HOME to" in notice
    assert take_notice() == ""


def test_unusable_variable_is_named_in_notice(monkeypatch, tmp_path, bad_home):
    """If Z4J_HOME itself is unusable, the notice has its value."""
    monkeypatch.setenv("Z4J_HOME", str(bad_home))
    assert settle_home() == tmp_path / "tmp" / ME
    assert f"cannot write to Z4J_HOME={bad_home}" in take_notice()


def test_variable_with_tilde_needs_home(monkeypatch, tmp_path, no_home):
    """``~`` in Z4J_HOME cannot be resolved without a home directory."""
    monkeypatch.setenv("Z4J_HOME", "~/state")
    assert settle_home() == tmp_path / "tmp" / ME
    assert "Z4J_HOME=~/state cannot be resolved" in take_notice()


@pytest.mark.parametrize("name", ["HOME", "Z4J_HOME"])
def test_relative_home_is_made_absolute(monkeypatch, tmp_path, name):
    """A relative directory stays the same when the process changes its working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "state")
    directory = settle_home()
    monkeypatch.chdir("/")
    assert directory.is_relative_to(tmp_path)
    assert settle_home() == z4j_home() == directory


def test_home_with_long_path_is_replaced(monkeypatch, tmp_path):
    """SQLite opens no file in a directory whose path is too long."""
    monkeypatch.setenv("Z4J_HOME", str(tmp_path.joinpath(*["d" * 200] * 3)))
    assert settle_home() == tmp_path / "tmp" / ME
    assert "File name too long" in take_notice()


def test_home_in_loop_of_links_is_replaced(monkeypatch, tmp_path):
    """The notice names a HOME that is a loop of symbolic links."""
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("HOME", str(tmp_path / "loop"))
    assert settle_home() == tmp_path / "tmp" / ME
    assert f"{tmp_path / 'loop'}" in take_notice()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_home_of_other_user_is_replaced(monkeypatch, tmp_path):
    """The same with real permissions, for every user but root."""
    monkeypatch.setenv("HOME", "/")
    assert settle_home() == tmp_path / "tmp" / ME
    assert "cannot write to /.z4j (Permission denied)" in take_notice()


def test_read_only_home_is_replaced(monkeypatch, tmp_path):
    """On a file system that is mounted read-only the notice says so."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, *_args, **_options: path != tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result([0] * 8 + [os.ST_RDONLY, 0]))
    settle_home()
    assert f"cannot write to {tmp_path}/.z4j (Read-only file system)" in take_notice()


def occupy(directory, how):
    if how == "a link":
        directory.symlink_to(directory.parent)
    elif how == "writable by others":
        directory.mkdir()
        directory.chmod(0o777)
    else:
        directory.mkdir(mode=0o700)
        os.chown(directory, 12345, 12345)


@pytest.mark.parametrize(
    "how",
    [
        "a link",
        "writable by others",
        pytest.param(
            "somebody else's",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner"),
        ),
    ],
)
def test_replacement_that_is_not_private_is_refused(monkeypatch, tmp_path, no_home, how):
    """If another user occupies each predictable name, the name of the directory is random."""
    monkeypatch.setattr(home, "temporary_directories", lambda: [tmp_path / "tmp" / ME])
    occupy(tmp_path / "tmp" / ME, how)
    directory = settle_home()
    assert directory.name.startswith(f"{ME}-")
    assert home.is_private(directory)


def test_settled_home_is_kept(bad_home, tmp_path):
    """A second call gives the same directory, also if it has become unusable."""
    first = settle_home()
    first.rmdir()
    (tmp_path / "tmp").rmdir()
    assert settle_home() == first


def test_other_user_settles_again(monkeypatch, bad_home, tmp_path):
    """After Celery has changed the user of the process, the directory of that user is used."""
    settle_home()
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    mine = f"z4j-{other}"
    monkeypatch.setattr(os, "access", lambda path, *_args, **_options: mine in Path(path).parts)
    monkeypatch.setattr(home, "private_directory", lambda directory: directory)
    (tmp_path / "tmp" / f"z4j-{other}").mkdir()
    assert settle_home() == tmp_path / "tmp" / f"z4j-{other}"


def test_reader_creates_no_replacement(bad_home, tmp_path):
    """A command that only reads uses a replacement that an agent has created, and no other."""
    assert settle_home(create=False) == bad_home
    assert control.list_clients() == []
    assert not list((tmp_path / "tmp").iterdir())
    (tmp_path / "tmp" / ME).mkdir(mode=0o700)
    assert settle_home(create=False) == tmp_path / "tmp" / ME


@pytest.mark.parametrize("kind", ["no_home", "bad_home"])
def test_agent_runs_in_replacement(request, kind, tmp_path, installed, until, caplog):
    """Buffer, pid file and control socket are in the replacement, and one warning is logged."""
    request.getfixturevalue(kind)
    agent = installed()
    directory = tmp_path / "tmp" / ME
    assert agent.config.buffer_path.parent == directory
    until(lambda: control.list_clients())
    assert list(directory.glob("agent-bare.*.sock"))
    about_home = [each for each in warnings_of(caplog) if "Z4J_HOME" in each]
    assert len(about_home) == 1
    assert str(directory) in about_home[0]


def test_configuration_of_adapter_is_moved(bad_home, tmp_path, installed, caplog):
    """A buffer path that an adapter determined before the check moves to the replacement."""
    agent = installed(autostart=False)
    agent.config = agent.config.model_copy(update={"buffer_path": bad_home / "buffer-1.sqlite"})
    agent.start()
    assert agent.config.buffer_path == tmp_path / "tmp" / ME / "buffer-1.sqlite"


def test_explicit_buffer_path_is_kept(bad_home, tmp_path, installed):
    """``install_agent(buffer_path=...)`` is not moved."""
    agent = installed(buffer_path=tmp_path / "own" / "b.sqlite")
    assert agent.config.buffer_path == tmp_path / "own" / "b.sqlite"


@pytest.mark.parametrize("kind", ["no_home", "bad_home"])
def test_agent_without_writable_directory_buffers_in_memory(
    request, kind, monkeypatch, tmp_path, installed, until, caplog
):
    """The host goes on, and the one warning names Z4J_HOME."""
    request.getfixturevalue(kind)
    (tmp_path / "other").touch()
    nowhere = [tmp_path / "other" / ME]
    monkeypatch.setattr(home, "temporary_directories", lambda: nowhere)
    monkeypatch.setattr("z4j_bare.buffer.files.temporary_directories", lambda: nowhere)
    agent = installed()
    agent.record_event(
        Event.model_construct(
            id=uuid4(),
            engine="stub",
            task_id="t",
            kind=EventKind.TASK_SUCCEEDED,
            occurred_at=datetime.now(UTC),
            data={},
        )
    )
    until(lambda: any("in memory only" in each for each in warnings_of(caplog)))
    assert agent.state is runtime.RuntimeState.RUNNING
    about_home = [each for each in warnings_of(caplog) if "Z4J_HOME" in each]
    assert len(about_home) == 1
    assert "set Z4J_HOME to a private directory" in about_home[0]


@pytest.mark.parametrize("variable", ["Z4J_DISABLED", "Z4J_TESTING", "none"])
def test_import_settles_user_without_home(variable, tmp_path):
    """Adapters that ask z4j_core first find a directory, also if no agent is to start."""
    script = (
        "import os, pwd\n"
        "pwd.getpwuid = {}.__getitem__\n"
        "import z4j_bare\n"
        "from z4j_core.models import Config\n"
        "print(Config(brain_url='http://b', token='t', project_id='p').buffer_path.parent)\n"
        "if os.environ.get('Z4J_DISABLED') or os.environ.get('Z4J_TESTING'):\n"
        "    z4j_bare.install_agent(engines=[object.__new__(type('E', (), {'name': 'e'}))])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, variable: "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "tmp" / ME)), done.stderr


def test_doctor_warns_of_replacement(bad_home):
    """The probe names the unusable directory and the setting."""
    settle_home()
    result = diagnostics.probe_buffer_path(settle_home() / "store")
    assert result.verdict == "WARN"
    assert f"cannot write to {bad_home}" in result.text
    assert "Z4J_HOME" in result.fix


def test_ensure_home_creates_private_parents(monkeypatch, tmp_path):
    """Directory and missing parents have mode 0700."""
    monkeypatch.setenv("Z4J_HOME", str(tmp_path / "a" / "b"))
    assert ensure_home() == tmp_path / "a" / "b"
    for each in (tmp_path / "a", Path(tmp_path / "a" / "b")):
        assert each.stat().st_mode & 0o777 == 0o700
