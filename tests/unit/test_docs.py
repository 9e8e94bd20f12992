"""What the documentation says of the tests is so."""

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_guarantees_are_held_by_tests_that_exist():
    """Every test that the table of guarantees names is in the file that it names."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/guarantees.md").read_text())
    files = defaultdict(str)  # two of one name, in tests/unit and tests/e2e, count as one
    for path in (ROOT / "tests").glob("*/test_*.py"):
        files[path.name] += path.read_text()
    assert len(named) > 20
    assert [(file, test) for file, test in named if f"def {test}(" not in files[file]] == []
