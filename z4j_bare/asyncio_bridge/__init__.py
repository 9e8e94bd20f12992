"""Runs the asyncio-based z4j adapters. asyncio itself is imported when a loop is first needed."""
