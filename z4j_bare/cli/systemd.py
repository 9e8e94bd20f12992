"""What systemd wants to hear from a service of ``Type=notify``; silence where nobody listens."""

from __future__ import annotations

import os
import socket
import time


class Notifier:
    """Sends to ``$NOTIFY_SOCKET``; nothing here raises, for an agent does not depend on who started it."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._every = _watchdog_seconds()
        self._barked_at = float("-inf")
        self._status = ""

    def ready(self) -> None:
        """Tell that the agent is up: it captures and buffers, be the brain there or not."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """Set the line that ``systemctl status`` shows, if it has changed."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Feed the watchdog, three times in the interval that it allows; call it as often as you like."""
        now = time.monotonic()
        if self._every and now - self._barked_at >= self._every / 3:
            self._barked_at = now
            self._send("WATCHDOG=1")

    def stop_event(self) -> None:
        """Tell that the end has begun."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address or not hasattr(socket, "AF_UNIX"):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
                line.sendto(text.encode(), address)
        except OSError:
            pass


def _watchdog_seconds() -> float:
    """Return the seconds that systemd allows between two signs of life of this very process, 0: it does not watch."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0
