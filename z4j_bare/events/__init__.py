"""Event capture for every engine: ring, snapshots, redaction and encoding."""
