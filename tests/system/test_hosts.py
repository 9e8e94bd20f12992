"""Hosts without a usable state directory, and a full disk. The tests need root on Linux."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.parts import missing
from tests.support.peer import SECRET_TEXT, TOKEN

HOST = Path(__file__).parent / "apps" / "recording_host.py"
ROOT = Path(__file__).parents[2]

#: A user id without an entry in the password database, as OpenShift assigns them.
UID = 1_000_680_000

#: Number of processes that share a full disk.
PROCESSES = 16


@pytest.fixture(autouse=True)
def as_root():
    """Skip the tests where the user cannot be changed and no file system can be mounted."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        missing("root on Linux", "run `tox -e system` as root")
    for program in ("setpriv", "unshare", "mount"):
        if shutil.which(program) is None:
            missing(program, "apt-get install util-linux")


@pytest.fixture(autouse=True)
def no_replacements():
    """Delete the directories that replaced a home, because each host would adopt their rows."""

    def delete():
        for base in ("/tmp", "/var/tmp"):
            shutil.rmtree(Path(base) / f"z4j-{UID}", ignore_errors=True)

    delete()
    yield
    delete()


@pytest.fixture
def temporary(tmp_path):
    """A directory that every user may enter and write, as /tmp."""
    path = Path("/tmp") / f"z4j-test-{os.getpid()}"
    path.mkdir()
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def environment(**variables):
    """Return the environment of a host, without HOME and Z4J_HOME."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "Z4J_BRAIN_URL": "http://127.0.0.1:9",
        "Z4J_TOKEN": TOKEN,
        "Z4J_HMAC_SECRET": SECRET_TEXT,
        "Z4J_PROJECT_ID": "p",
        "Z4J_FLUSH_SECONDS": "0",
        **variables,
    }


def as_user(*command):
    """Return a command that runs as :data:`UID`, which may read every file and write none.

    The capability to read is needed, because the interpreter may be in the home of root.
    """
    caps = "-all,+dac_read_search"
    user = [f"--reuid={UID}", "--regid=0", "--clear-groups"]
    kept = [f"--{kind}={caps}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    return ["setpriv", *user, *kept, *command]


def read_only(*command):
    """Return a command that runs in a copy of the mounts in which nothing can be written."""
    script = 'mount --rbind / / && mount -o remount,bind,ro / && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", *command]


def start(wrapper, variables, number=50, size=10):
    return subprocess.Popen(
        wrapper(sys.executable, str(HOST), str(number), str(size)),
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """Return the outcomes that the hosts printed, and their warnings about the state directory.

    The hosts end after the last one has printed its outcome, because a running host adopts the rows
    of an ended host. The result excludes the warning at exit that rows in memory are lost.
    """
    outcomes, warned = [process.stdout.readline() for process in processes], []
    for process in processes:
        _, errors = process.communicate("\n", timeout=100)
        assert process.returncode == 0, errors
        lines = [line for line in errors.splitlines() if "Z4J_HOME" in line]
        warned += [line for line in lines if "are lost with this process" not in line]
    return [json.loads(outcome) for outcome in outcomes], warned


@pytest.mark.parametrize(
    "home",
    [{}, {"HOME": "/"}, {"HOME": "/nonexistent"}, {"HOME": "/root"}, {"Z4J_HOME": "/srv/z4j"}],
    ids=str,
)
def test_user_without_usable_home_gets_temporary_directory(temporary, home):
    """The agent runs with its buffer in a private directory, and one warning names Z4J_HOME."""
    (outcome,), warnings = finish(start(as_user, environment(TMPDIR=str(temporary), **home)))
    assert outcome == {
        "home": str(temporary / f"z4j-{UID}"),
        "kept": 50,
        "lost": 0,
        "durable": True,
    }
    (warning,) = warnings
    assert outcome["home"] in warning
    assert (temporary / f"z4j-{UID}").stat().st_uid == UID
    assert (temporary / f"z4j-{UID}").stat().st_mode & 0o777 == 0o700


def test_directory_of_other_user_is_refused(temporary):
    """If root owns the predictable name, the name of the directory is random."""
    (temporary / f"z4j-{UID}").mkdir(mode=0o777)
    (outcome,), warnings = finish(start(as_user, environment(TMPDIR=str(temporary))))
    assert Path(outcome["home"]) != temporary / f"z4j-{UID}"
    assert outcome["durable"]
    assert len(warnings) == 1


@pytest.mark.parametrize("home", [{}, {"HOME": "/root"}], ids=str)
def test_host_on_read_only_system_buffers_in_memory(home):
    """No directory can be written: the host runs, and the one warning names Z4J_HOME."""
    (outcome,), warnings = finish(start(read_only, environment(**home)))
    assert (outcome["kept"], outcome["lost"], outcome["durable"]) == (50, 0, False)
    (warning,) = warnings
    assert "in memory only" in warning
    assert "set Z4J_HOME" in warning


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB that belongs to the user."""
    path = tmp_path / "disk"
    path.mkdir()
    options = f"size=6m,mode=0700,uid={UID}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "z4j", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_full_disk_that_processes_share_loses_nothing_silently(small_disk):
    """Each event of each process is kept or counted, and a warning names the settings."""
    number = 600
    variables = environment(Z4J_HOME=str(small_disk))
    hosts = [start(as_user, variables, number=number, size=2000) for _ in range(PROCESSES)]
    outcomes, warned = finish(*hosts)
    assert [each["kept"] + each["lost"] for each in outcomes] == [number] * PROCESSES
    assert warned
    for warning in warned:
        assert "Free disk space" in warning
        assert "Z4J_BUFFER_MAX_BYTES" in warning
