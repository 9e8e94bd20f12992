"""z4j agent runtime for task workers."""
