"""``z4j-bare demo``: runs a script of tasks on a real worker and a real brain.

The script counts the tasks that it sends. The demo compares these counts with the brain's counts.

End-to-end tests and benchmarks start brains and workers with the modules ``brain`` and ``worker``.
"""
