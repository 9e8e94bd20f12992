"""Every published adapter on this package: its real package and host, a real broker, the real brain."""
