"""What schedulers have planned: sequenced streams to the brain, and operators' orders back."""

from __future__ import annotations

from z4j_bare.schedules.manager import ScheduleManager

__all__ = ["ScheduleManager"]
