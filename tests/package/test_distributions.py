"""The wheel and the source distribution are reproducible and complete."""

import configparser
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.constraints import EXTRAS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def metadata(wheel):
    """The metadata of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_two_builds_are_equal(builds):
    """Builds of copies with other times, modes and time zones have equal hashes."""
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        for paths in builds
    )
    assert len(first) == 2
    assert first == second


def test_twine_accepts_both_files(builds):
    """``twine check --strict`` reports nothing about the wheel and the source distribution."""
    done = subprocess.run(
        (sys.executable, "-m", "twine", "check", "--strict", *builds[0]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_licence_is_an_expression_with_its_file(metadata, wheel):
    """The licence is the SPDX expression of PEP 639, and the wheel contains its text."""
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["License"] is None
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_classifiers_name_tested_versions(metadata):
    """The classifiers name exactly the Python versions for which tox.ini has environments."""
    named = {
        found[1]
        for line in metadata.get_all("Classifier")
        if (found := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line))
    }
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    tested = set(re.findall(r"\bpy3(\d+)-", tox["tox"]["labels"])) | {"11"}
    assert named == tested
    assert metadata["Requires-Python"] == ">=3.11"


def test_wheel_contains_the_package_only(wheel):
    """The wheel contains every module of the package and nothing else."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "z4j_bare").rglob("*.py")} | {
        "z4j_bare/py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == modules


def test_source_distribution_contains_every_file(source_distribution):
    """The source distribution contains the pages, the tests and the files that run them."""
    with tarfile.open(source_distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        owners = {(member.uid, member.uname, member.mtime) for member in archive}
    needed = {
        path.relative_to(ROOT).as_posix()
        for folder in ("z4j_bare", "tests", "docs", "benchmarks", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "out", "_build"} & set(path.parts)
    }
    needed |= {"CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "ruff.toml", "tox.ini"}
    assert needed - names == set()
    assert len(owners) == 1


def test_constraints_name_every_dependency(wheel, metadata):
    """``constraints.txt`` pins this version and exactly the packages that pip installs with it."""
    path = ROOT / "constraints.txt"
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pinned = {
        requirement.name.lower().replace("_", "-"): str(requirement.specifier)
        for line in lines
        if line
        for requirement in [Requirement(line)]
    }
    assert pinned["z4j-bare"] == f"=={metadata['Version']}"
    done = subprocess.run(
        (
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"),
            *("--ignore-installed", "--report", "-", "--constraint", path, f"{wheel}[{EXTRAS}]"),
        ),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    installed = {
        item["metadata"]["name"].lower().replace("_", "-"): f"=={item['metadata']['version']}"
        for item in json.loads(done.stdout)["install"]
    }
    # A later version of Python may need fewer packages. The file covers the lowest version.
    assert installed.items() <= pinned.items()
    if sys.version_info[:2] == (3, 11):
        assert installed == pinned
