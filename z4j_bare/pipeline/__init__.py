"""Sends events from the ring to the brain, and passes the brain's frames to their handlers."""
