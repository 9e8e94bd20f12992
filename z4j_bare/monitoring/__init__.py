"""Health, metrics and reports of a running agent and of the worker around it."""
