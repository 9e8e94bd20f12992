"""Tests of single rooms and of rooms put together in one process."""
