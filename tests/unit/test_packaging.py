"""The package's metadata agrees with the changelog, the pages and the test environments."""

import configparser
import re
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_cfg():
    """The parsed setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lower_bounds(text):
    """Return the lower bound of each requirement that has one."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z0-9_.\-]+)(?:\[\w+\])?>=([0-9.]+)", line.strip())
        if match:
            found[match[1]] = match[2]
    return found


def test_lowest_environment_installs_lower_bounds(setup_cfg):
    """``tests/lowest.txt`` pins exactly the lower bounds of ``setup.cfg``."""
    declared = lower_bounds(setup_cfg["options"]["install_requires"])
    for extra in ("celery", "demo", "eventlet"):
        declared |= lower_bounds(setup_cfg["options.extras_require"][extra])
    pinned = dict(
        line.split("==")
        for line in (ROOT / "tests/lowest.txt").read_text().splitlines()
        if "==" in line
    )
    assert pinned == declared


def test_version_satisfies_adapters_requirement():
    """The version is in z4j-bare>=1.13.0,<2, which every published adapter requires."""
    assert version("z4j-bare").startswith("1.13.0+green.")


def test_changelog_has_entry_of_version():
    """The installed version has an entry in the changelog."""
    assert f"## [{version('z4j-bare')}]" in (ROOT / "CHANGELOG.md").read_text()


def test_source_distribution_contains_pages_and_tests():
    """The source distribution contains the pages, the tests, and the files that run them."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    required = ("CHANGELOG.md", "tox.ini", "ruff.toml", "docs", "tests", "benchmarks")
    assert [name for name in required if name not in manifest] == []


def test_pages_name_this_version(setup_cfg):
    """Every version of this package that a page names is the present one."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        found
        for page in pages
        for found in re.findall(r"\b1\.\d+\.\d+\+green\.\d+", page.read_text())
    }
    assert named == {setup_cfg["metadata"]["version"]}


def test_no_page_installs_the_other_package():
    """No page links to the existing agent on the index or installs it by the plain name."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*")]
    # conf.py may have been imported, hence .pyc.
    texts = [page.read_text() for page in pages if page.is_file() and page.suffix != ".pyc"]
    lines = [line for text in texts for line in text.splitlines()]
    assert [line for line in lines if "pypi.org/project/z4j-bare" in line] == []
    assert [
        line
        for line in lines
        if re.match(r"\s*pip install ['\"]?z4j-bare(\[\w+\])?['\"]?(\s|$)", line)
    ] == []
