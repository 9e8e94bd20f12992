"""Fixtures of the buffer's tests."""

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The configured path. Its directory is the only one in which stores are found."""
    monkeypatch.setattr(
        "z4j_bare.buffer.files.candidate_directories", lambda path: [Path(path).parent]
    )
    return tmp_path / "home" / "buffer.sqlite"
