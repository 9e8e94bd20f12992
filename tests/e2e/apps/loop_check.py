"""A check for a visible running asyncio loop."""

import asyncio
import time

#: Time between two checks, in seconds.
CHECK_INTERVAL = 0.001


def sees_a_loop():
    """Whether a running loop is visible within half a second, while the agent's greenlets run."""
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            time.sleep(CHECK_INTERVAL)
        else:
            return True
    return False
