"""Celery: event capture, health probes and worker controls."""
