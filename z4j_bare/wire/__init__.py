"""The protocol without I/O and without a clock: the caller passes received bytes and the time."""
