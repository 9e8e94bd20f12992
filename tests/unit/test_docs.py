"""The pages of the documentation agree with the tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_guarantees_name_existing_tests():
    """Every test that the table of guarantees names exists in the named file."""
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / "docs/guarantees.md").read_text())
    assert len(named) > 20
    missing = [(file, test) for file, test in named if f"def {test}(" not in _read(file)]
    assert missing == []


def _read(file):
    path = ROOT / "tests" / file
    return path.read_text() if path.is_file() else ""
