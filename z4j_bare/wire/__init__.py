"""The protocol without I/O: bytes and ``now`` go in, bytes and decisions come out."""
