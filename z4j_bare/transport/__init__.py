"""Bytes to the brain and back, one module per transport."""
