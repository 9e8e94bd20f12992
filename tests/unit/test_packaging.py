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
    pinned = dict(line.split("==") for line in (ROOT / "tests/lowest.txt").read_text().splitlines() if "==" in line)
    assert pinned == promised


def test_adapters_resolve_to_us():
    """The version lies in z4j-bare>=1.13.0,<2, which every published adapter requires."""
    assert version("z4j-bare").startswith("1.13.0+green.")


def test_the_changelog_knows_the_version():
    """The installed version has its entry in the changelog."""
    assert f"## [{version('z4j-bare')}]" in (ROOT / "CHANGELOG.md").read_text()
