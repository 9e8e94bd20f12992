"""Operators' commands: a table of actions, and the core that runs each once and answers."""

from __future__ import annotations

from z4j_bare.commands.dispatcher import Dispatcher

__all__ = ["Dispatcher"]
