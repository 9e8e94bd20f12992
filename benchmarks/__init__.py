"""Benchmarks of the agent; ``benchmarks/README.md`` describes them."""
