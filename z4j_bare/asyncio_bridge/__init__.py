"""Hosts the asyncio-flavoured z4j adapters. Importing it loads no asyncio; the bridge does, on first need."""
