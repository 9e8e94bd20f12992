"""The streams that publish schedules, and the operators' commands that change schedules."""

from __future__ import annotations

from z4j_bare.schedules.manager import ScheduleManager, scheduler_hosts

__all__ = ["ScheduleManager", "scheduler_hosts"]
