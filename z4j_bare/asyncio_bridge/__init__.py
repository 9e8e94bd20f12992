"""Runs the asyncio-based adapters. asyncio is imported when a loop is first needed."""
