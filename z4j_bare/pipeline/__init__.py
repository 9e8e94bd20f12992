"""Short functions that pump the rooms below: one loop over the narrow backend, never a second copy for another runtime."""
