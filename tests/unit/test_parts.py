"""With REQUIRE_PARTS a test that is skipped because a part is missing fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.parts import REQUIRED

ROOT = Path(__file__).parents[2]

#: The hooks of this project's tests.
CONFTEST = (
    "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401"
)

#: Modules by name. In each, a part is missing in another way.
MISSING = {
    "call_in_test": """
from tests.support import parts
def test():
    parts.missing("PostgreSQL", "apt-get install postgresql")
""",
    "call_in_fixture": """
import pytest
from tests.support import parts
@pytest.fixture(scope="session")
def server():
    parts.missing("PostgreSQL", "apt-get install postgresql")
def test(server):
    pass
""",
    "mark": """
from tests.support import parts
@parts.requires(None, "PostgreSQL", "apt-get install postgresql")
def test():
    pass
""",
    "mark_of_module": """
from tests.support import parts
pytestmark = parts.requires(None, "PostgreSQL", "apt-get install postgresql")
def test():
    pass
""",
    "package_of_test": """
import pytest
def test():
    pytest.importorskip("PostgreSQL")
""",
    "package_of_module": """
import pytest
pytest.importorskip("PostgreSQL")
def test():
    pass
""",
}

#: Outcomes that are the same with and without REQUIRE_PARTS.
OTHER = """
import pytest
def test_skipped():
    pytest.skip("there is no hub")
@pytest.mark.xfail(strict=True)
def test_that_fails():
    assert False
def test_that_passes():
    pass
"""


@pytest.fixture
def run(mode, tmp_path):
    """``run(required)``: run all modules, and return the summary's line of each module."""
    if mode != "threads":
        pytest.skip("the subprocess is the same in every mode")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name, source in {**MISSING, "other": OTHER}.items():
        (tmp_path / f"test_{name}.py").write_text(source)

    def run_modules(required):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-rA", "--no-fold-skipped"),
                *("--continue-on-collection-errors", "-p", "no:cacheprovider", str(tmp_path)),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), REQUIRED: required},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        return done.returncode, done.stdout.splitlines()

    return run_modules


def outcomes(lines, name):
    """Return the sorted outcomes of a module's tests, and the last line of the summary."""
    found = [line for line in lines if f" test_{name}.py" in line and line[0].isupper()]
    return sorted(line.split()[0] for line in found), found[-1]


def test_missing_part_fails_run_if_required(run):
    """Each test whose part is missing fails and names the part; other outcomes do not change."""
    code, lines = run("1")
    assert code == pytest.ExitCode.TESTS_FAILED
    for name in MISSING:
        (outcome,), line = outcomes(lines, name)
        assert outcome in ("FAILED", "ERROR"), line
    reasons = [line for line in lines if f"; {REQUIRED} is set" in line and "PostgreSQL" in line]
    assert len(reasons) >= len(MISSING)
    assert outcomes(lines, "other")[0] == ["PASSED", "SKIPPED", "XFAIL"]


def test_missing_part_skips_test_otherwise(run):
    """Without the variable, a test whose part is missing is skipped; the reason names the part."""
    code, lines = run("")
    assert code == pytest.ExitCode.OK
    for name in MISSING:
        (outcome,), line = outcomes(lines, name)
        assert outcome == "SKIPPED"
        assert "PostgreSQL" in line
