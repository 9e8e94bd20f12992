"""The brain's protocol without I/O or clock: callers pass the received bytes and the time."""
