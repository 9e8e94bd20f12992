"""Operators' changes to schedules that are defined in code (huey, arq, taskiq)."""

from z4j_bare.native_schedules.control import NativeScheduleControl

__all__ = ["NativeScheduleControl"]
