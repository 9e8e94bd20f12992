"""Benchmarks of the agent beside no agent and beside the existing one; see ``docs/performance.md``."""
