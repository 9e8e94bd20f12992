"""How the host is: its broker, its hub, its worker. Each probe in a task of its own, bounded, the last good answer kept."""
