"""Engines: their descriptions, hosts and event sources."""
