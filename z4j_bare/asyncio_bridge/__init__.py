"""Runs the asyncio-based z4j adapters. This package imports asyncio when it first needs a loop."""
