"""``z4j-bare demo``: runs a script of tasks on a real worker and a real brain.

The script counts its tasks, and the demo compares these counts with those of the brain.

End-to-end tests and benchmarks start their peers with the ``brain`` and ``worker`` modules.
"""
