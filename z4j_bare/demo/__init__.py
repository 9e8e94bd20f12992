"""``z4j-bare demo``: a real brain, a real worker and a small scripted day, counted by both sides.

``brain`` and ``worker`` start the real peers and are public tools: the end-to-end tests and the benchmarks
stand on them.
"""
