"""The distributions, built twice from copies whose times, modes and time zones differ."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Names of files that do not belong to a release.
_OTHER = (".git", ".tox", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache")

#: The date of the builds in seconds since 1970. The value does not matter.
EPOCH = "1795910400"


def _build(source, umask, zone):
    """Start a build of a copy of the repository; return the process and the copy."""
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*_OTHER), copy_function=shutil.copy)
    for path in source.rglob("*"):
        path.chmod((0o777 if path.is_dir() or path.stat().st_mode & 0o100 else 0o666) & ~umask)
    command = (sys.executable, "-m", "build", "--no-isolation")
    environ = os.environ | {"SOURCE_DATE_EPOCH": EPOCH, "TZ": zone, "PYTHONHASHSEED": str(umask)}
    return subprocess.Popen(
        command,
        cwd=source,
        env=environ,
        umask=umask,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """Two lists of the built files, each sorted: the source distribution and the wheel."""
    parent = tmp_path_factory.mktemp("builds")
    sources = parent / "first", parent / "second"
    processes = [
        _build(source, umask, zone)
        for source, umask, zone in zip(sources, (0o022, 0o002), ("UTC", "Asia/Tokyo"), strict=True)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return [sorted((source / "dist").iterdir(), reverse=True) for source in sources]


@pytest.fixture(scope="session")
def wheel(builds):
    """The path of the wheel."""
    (found,) = (path for path in builds[0] if path.suffix == ".whl")
    return found


@pytest.fixture(scope="session")
def source_distribution(builds):
    """The path of the source distribution."""
    (found,) = (path for path in builds[0] if path.suffix == ".gz")
    return found
