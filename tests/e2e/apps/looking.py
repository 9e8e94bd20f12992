"""The look for a running asyncio loop, which no host may see."""

import asyncio
import time


def sees_a_loop():
    """Say whether any moment of half a second shows a running loop: the agent's own greenlets run in between."""
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            time.sleep(0.001)
        else:
            return True
    return False
