"""The command line: a command is a module, or a few functions of one, that ``main.py`` lists."""

from __future__ import annotations

from z4j_bare.cli.factories import make_engine_main, make_main_for_adapter
from z4j_bare.cli.main import main

__all__ = ["main", "make_engine_main", "make_main_for_adapter"]
