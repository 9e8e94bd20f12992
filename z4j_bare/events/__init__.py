"""The hot path: what the host pays for each event."""
