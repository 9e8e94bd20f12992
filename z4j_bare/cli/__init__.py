"""The command line: one module per command, each with ``add_arguments`` and ``run``."""

from __future__ import annotations

from z4j_bare.cli.main import main

__all__ = ["main"]
