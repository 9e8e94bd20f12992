"""Implements the notification protocol of a systemd service with ``Type=notify``."""

from __future__ import annotations

import os
import socket
import time


class Notifier:
    """Sends notifications to ``$NOTIFY_SOCKET``. If the variable is not set, nothing is sent.

    No method raises an exception, because the agent must work under every service manager.
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._watchdog_seconds = _watchdog_seconds()
        self._watchdog_sent_at = float("-inf")
        self._status = ""

    def ready(self) -> None:
        """Report that the agent has started.

        The agent need not have a session, because it captures and buffers events even if the brain
        is unreachable.
        """
        self._send("READY=1")

    def status(self, text: str) -> None:
        """Set the status line of ``systemctl status``. An unchanged line is not sent again."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Reset the watchdog's timer, at most three times per watchdog interval.

        systemd restarts the service if no reset arrives within the interval.
        """
        now = time.monotonic()
        if self._watchdog_seconds and now - self._watchdog_sent_at >= self._watchdog_seconds / 3:
            self._watchdog_sent_at = now
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Report that the shutdown has begun."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address or not hasattr(socket, "AF_UNIX"):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(text.encode(), address)
        except OSError:
            pass


def _watchdog_seconds() -> float:
    """Return the watchdog interval that systemd set for this process, or 0."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return 0.0
