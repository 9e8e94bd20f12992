"""The package's metadata keeps the promises that adapters and the test environments rest on."""

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


def bounds(text):
    found = {}
    for line in text.splitlines():
        match = re.match(r"([A-Za-z0-9_.\-]+)>=([0-9.]+)", line.strip())
        if match:
            found[match[1]] = match[2]
    return found


def test_lowest_is_what_setup_cfg_allows(setup_cfg):
    """The lowest environment installs exactly the lower bounds that users are promised."""
    promised = bounds(setup_cfg["options"]["install_requires"])
    for extra in ("celery", "demo", "eventlet"):
        promised |= bounds(setup_cfg["options.extras_require"][extra])
    pinned = dict(
        line.split("==")
        for line in (ROOT / "tests/lowest.txt").read_text().splitlines()
        if "==" in line
    )
    assert pinned == promised


def test_adapters_resolve_to_us():
    """The version lies in z4j-bare>=1.13.0,<2, which every published adapter requires."""
    assert version("z4j-bare").startswith("1.13.0+green.")


def test_the_changelog_knows_the_version():
    """The installed version has its entry in the changelog."""
    assert f"## [{version('z4j-bare')}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_source_distribution_is_whole():
    """What stands in the repository beside the package goes along: pages, tests, and what runs them."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    wanted = ("CHANGELOG.md", "tox.ini", "ruff.toml", "docs", "tests", "benchmarks")
    assert [name for name in wanted if name not in manifest] == []


def test_the_docs_install_this_version(setup_cfg):
    """Every version of ours that a page tells to install or to pin is the present one."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        found
        for page in pages
        for found in re.findall(r"\b1\.\d+\.\d+\+green\.\d+", page.read_text())
    }
    assert named == {setup_cfg["metadata"]["version"]}


def test_no_page_sends_to_the_other_package():
    """No page takes the existing agent for this one: its page on the index, or an install by the bare name."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*")]
    texts = [
        page.read_text() for page in pages if page.is_file() and page.suffix != ".pyc"
    ]  # conf.py may have been imported
    lines = [line for text in texts for line in text.splitlines()]
    assert [line for line in lines if "pypi.org/project/z4j-bare" in line] == []
    assert [
        line
        for line in lines
        if re.match(r"\s*pip install ['\"]?z4j-bare(\[\w+\])?['\"]?(\s|$)", line)
    ] == []
