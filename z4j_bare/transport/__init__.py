"""The transports: WebSocket and long-poll."""
