"""Fixtures of the adapter tests, and the compatibility table of what they prove."""

from pathlib import Path

import pytest

from tests.adapters import compatibility
from tests.e2e.conftest import brain, redis_url

__all__ = ["brain", "redis_url"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
_proven = {}
_claims = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption(
        "--write-table",
        action="store_true",
        help="write what a whole run has proven to docs/compatibility.md",
    )


@pytest.fixture
def prove(request):
    """``prove(row, column, text)``: add a cell to the compatibility table if the test passes.

    ``compatibility.render`` describes the row.
    """
    request.node.stash[_claims] = []
    return lambda *claim: request.node.stash[_claims].append(claim)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.when == "call" and report.passed:
        for row, column, text in item.stash.get(_claims, []):
            _proven.setdefault(row, {})[column] = text
    return report


def pytest_sessionfinish(session, exitstatus):
    if (
        session.config.getoption("--write-table", default=False)
        and exitstatus == pytest.ExitCode.OK
    ):
        compatibility.write(DOCUMENT, _proven)
