"""What schedulers have planned: sequenced streams to the brain, and operators' orders back."""

from __future__ import annotations

from z4j_bare.schedules.manager import Schedules

__all__ = ["Schedules"]
