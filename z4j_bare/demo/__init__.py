"""``z4j-bare demo``: a real brain, a real worker and a scripted load, counted on both sides.

End-to-end tests and benchmarks start their peers with the ``brain`` and ``worker`` modules.
"""
