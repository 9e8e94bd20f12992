"""Parts that a test needs and that may be missing, such as a server of the system."""

import os

import pytest

#: Environment variable with which a missing part fails a test, as in CI.
REQUIRED = "REQUIRE_PARTS"

#: Start of the reason of a skip for a missing part.
_MISSING = "missing: "


def missing(part, fix):
    """Skip the running test, because ``part`` is missing; ``fix`` says what to install."""
    pytest.skip(f"{_MISSING}{part} ({fix})")


def requires(found, part, fix):
    """Return a mark that skips a test unless ``found`` is true."""
    return pytest.mark.skipif(not found, reason=f"{_MISSING}{part} ({fix})")


def fail_if_required(report):
    """Let a report of a skip for a missing part be a failure if all parts are required."""
    if report.skipped and os.environ.get(REQUIRED) and isinstance(report.longrepr, tuple):
        _, _, reason = report.longrepr
        if reason.removeprefix("Skipped: ").startswith((_MISSING, "could not import")):
            report.outcome = "failed"
            report.longrepr = f"{reason}; {REQUIRED} is set"
    return report
