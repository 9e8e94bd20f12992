"""The command line of z4j. ``main.py`` lists the commands and the modules that implement them."""

from __future__ import annotations

from z4j_bare.cli.factories import make_engine_main, make_main_for_adapter
from z4j_bare.cli.main import main

__all__ = ["main", "make_engine_main", "make_main_for_adapter"]
