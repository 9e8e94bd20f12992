"""Every published adapter on this package, with its real host, broker and brain."""
